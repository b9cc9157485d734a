"""A circuit: the parts of a model, or the connections between them, that do a task, each with a score."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ..address import Address
from .filed import Filed
from .number import amount

if TYPE_CHECKING:
    from networkx import DiGraph
    from pandas import DataFrame

ARROW = " -> "  # between the ends of an edge, in texts

Edge = tuple[str, str]
Item = str | Edge


@dataclass(frozen=True, eq=False)
class Circuit(Filed):
    """Nodes, or edges between nodes, with their scores, and which of them are `kept`: the circuit.

    A node is the text of an address; an edge goes from a node to an input of another one, "L0.mlp" -> "L5.attn.H3.q". A
    circuit with edges is a circuit of edges. A score is the (estimated) change of the metric when the clean value is
    replaced there: negative where the part helps a metric that is high on clean inputs; None: not known.

    Args: level: what the items are: "heads", "heads at positions", "mlps", "neurons", "edges" ... method: what scored
        them. about: provenance; "clean" and "corrupted" are the metric's mean on both inputs. kept: of
        the items; None: all of them.
    Raises: ValueError for a score that is no finite number, or a kept item that is not there.
    """

    kind, called = "circuit", "a circuit"
    suffixes = (".json", ".graphml", ".dot", ".csv")

    nodes: Mapping[str, float | None] = field(default_factory=dict)
    edges: Mapping[Edge, float | None] = field(default_factory=dict)
    level: str = "heads"
    method: str = "given"
    about: Mapping[str, object] = field(default_factory=dict)
    kept: frozenset[Item] | None = None

    def __post_init__(self) -> None:
        for item, score in self.scores.items():
            if score is not None and not math.isfinite(score):
                raise ValueError(f"the score of {said(item)} by {self.method} is {score}; a score is a finite number")
        kept = frozenset(self.scores) if self.kept is None else frozenset(self.kept)
        object.__setattr__(self, "kept", kept)
        for item in kept:
            if item not in self.scores:
                raise ValueError(f"{said(item)} is kept, and is none of the {len(self.scores)} {self.noun}")

    @classmethod
    def of(cls, items: Mapping[Item, float | None] | Collection[Item], *, level: str, method: str = "given",
           about: Mapping[str, object] | None = None, kept: Collection[Item] | None = None) -> Self:
        """A circuit of items: nodes, or edges as pairs of nodes, which are told apart; without scores, a list of them.

        >>> manual = Circuit.of(["L9.attn.H9", "L9.attn.H6"], level="heads", method="manual")
        >>> len(manual), "L9.attn.H6" in manual, manual.scored
        (2, True, False)
        """
        scores = dict(items) if isinstance(items, Mapping) else dict.fromkeys(items)
        of_edges = any(isinstance(item, tuple) for item in scores)
        parts = {"edges": scores} if of_edges else {"nodes": scores}
        return cls(**parts, level=level, method=method, about=dict(about or {}),
                   kept=None if kept is None else frozenset(kept))

    # -- what it is made of -------------------------------------------------------------------------------------------

    @property
    def scores(self) -> Mapping[Item, float | None]:
        """Of all items: the edges, if there are any, else the nodes."""
        return self.edges or self.nodes

    @property
    def noun(self) -> str:
        return "edges" if self.edges else "nodes"

    @property
    def scored(self) -> bool:
        """Whether the score of every item is known."""
        return all(score is not None for score in self.scores.values())

    @property
    def members(self) -> tuple[str, ...]:
        """The nodes of the circuit: those kept, or the ends of the edges that are."""
        if not self.edges:
            return tuple(node for node in self.nodes if node in self.kept)
        end = self.ending()
        return tuple(dict.fromkeys(node for u, v in self.edges if (u, v) in self.kept for node in (u, end(v))))

    @property
    def complement(self) -> Self:
        """The circuit of all that this one leaves out."""
        return replace(self, kept=frozenset(self.scores) - self.kept)

    @property
    def total(self) -> float | None:
        """The change of the metric from clean to corrupted inputs; None where it was not measured."""
        clean, corrupted = (self.about.get(name) for name in ("clean", "corrupted"))
        return None if clean is None or corrupted is None else corrupted - clean

    def __len__(self) -> int:
        return len(self.kept)

    def __iter__(self) -> Iterator[Item]:
        return (item for item in self.scores if item in self.kept)

    def __contains__(self, item: object) -> bool:
        if isinstance(item, str) and ARROW.strip() in item:
            item = tuple(part.strip() for part in item.split(ARROW.strip()))
        return item in self.kept or (bool(self.edges) and item in self.members)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} of {len(self.scores)} {self.noun} kept, {self.level}, {self.method})"

    # -- narrowed -----------------------------------------------------------------------------------------------------

    def ranking(self, *, absolute: bool = True) -> list[Item]:
        """All items, the one that matters most first, equal ones in their own order.

        Args: absolute: by the size of the score; else by what it adds to the total change of the metric, so that what
            works against the task comes last. Without a total, that is down.
        Raises: ValueError where scores are not known.
        """
        if not self.scored:
            unknown = next(item for item, score in self.scores.items() if score is None)
            raise ValueError(f"{said(unknown)} has no score by {self.method}, so that there is no ranking; "
                             "take a method that scores everything")
        way = -1 if self.total is None or self.total < 0 else 1
        value = (lambda item: abs(self.scores[item])) if absolute else (lambda item: way * self.scores[item])
        return sorted(self.scores, key=value, reverse=True)

    def top(self, n: int, *, absolute: bool = True) -> Self:
        """The circuit of the n items that matter most; see `ranking`.

        Raises: ValueError for a number that is none from 0 to all.

        >>> found = Circuit.of({"L0.attn.H0": -2.0, "L0.attn.H1": 0.1, "L1.attn.H0": 1.5}, level="heads")
        >>> list(found.top(2)), list(found.top(2, absolute=False))
        (['L0.attn.H0', 'L1.attn.H0'], ['L0.attn.H0', 'L0.attn.H1'])
        """
        if not 0 <= n <= len(self.scores):
            raise ValueError(f"{n} of {len(self.scores)} {self.noun} cannot be kept; give 0 to {len(self.scores)}")
        return self.keep(self.ranking(absolute=absolute)[:n])

    def threshold(self, x: float) -> Self:
        """The circuit of the items whose score is at least x in size."""
        return self.keep([item for item in self.ranking() if abs(self.scores[item]) >= x])

    def keep(self, items: Collection[Item]) -> Self:
        """The circuit of these of the items. Raises: ValueError for one that is none of them."""
        return replace(self, kept=frozenset(items))

    def prune(self) -> Self:
        """The circuit without edges that are on no way from the input to the logits. A circuit of nodes stays."""
        if not self.edges:
            return self
        links, end = list(self), self.ending()
        names = {node for u, v in self.edges for node in (u, end(v))}
        starts = {node for node in names if Address.parse(node).part == "embed"}
        ends = {node for node in names if Address.parse(node).part == "logits"}
        if not starts or not ends:  # named otherwise: what nothing leads to, and what leads nowhere
            into, out = {end(v) for _, v in self.edges}, {u for u, _ in self.edges}
            starts, ends = starts or names - into, ends or names - out
        reached = _reached(starts, [(u, end(v)) for u, v in links])
        needed = _reached(ends, [(end(v), u) for u, v in links])
        return self.keep([(u, v) for u, v in links if u in reached and end(v) in needed])

    def whole(self, how: str = "sum") -> Self:
        """A circuit of nodes at positions as one of nodes: scores summed, or the largest in size ("max"); a node is
        kept if it is anywhere.

        Raises: ValueError for a circuit of edges, or another word.
        """
        if self.edges or how not in ("sum", "max"):
            raise ValueError(f"nodes are taken together over positions by sum or max, got {how!r} of {self.noun}")
        parts: dict[str, list[float | None]] = {}
        for node, score in self.nodes.items():
            parts.setdefault(node.partition("@")[0], []).append(score)
        one = {"sum": sum, "max": lambda scores: max(scores, key=abs)}[how]
        nodes = {node: None if None in scores else one(scores) for node, scores in parts.items()}
        kept = frozenset(node.partition("@")[0] for node in self.kept)
        return replace(self, nodes=nodes, kept=kept, level=self.level.removesuffix(" at positions"))

    def ending(self) -> Callable[[str], str]:
        """From a destination to its node: whose input it is, or itself where edges leave it, as inside of heads."""
        sources = {u for u, _ in self.edges}
        return lambda v: v if v in sources else owner(v)

    # -- tables and graphs --------------------------------------------------------------------------------------------

    def frame(self) -> DataFrame:
        """One row an item, in their own order: its score, its share of the total change, and whether it is kept."""
        from pandas import DataFrame

        total = self.total
        share = lambda score: None if score is None or not total else score / total
        ends = (lambda item: {"source": item[0], "destination": item[1]}) if self.edges else lambda item: {"node": item}
        lines = [{**ends(item), "score": score, "share": share(score), "kept": item in self.kept}
                 for item, score in self.scores.items()]
        columns = ["source", "destination"] if self.edges else ["node"]
        frame = DataFrame(lines, columns=[*columns, "score", "share", "kept"])
        return frame.astype({"score": float, "share": float}).set_index(columns)

    def graph(self) -> DiGraph:
        """What is kept as a graph of networkx: nodes with "layer", edges with "score" and "input" (q, k, v or "")."""
        from networkx import MultiDiGraph

        found = MultiDiGraph(level=self.level, method=self.method)
        for node in self.members:
            score, layer = self.nodes.get(node), Address.parse(node).layer
            known = {"score": score, "layer": layer}
            found.add_node(node, **{name: value for name, value in known.items() if value is not None})
        end = self.ending()
        for u, v in self if self.edges else ():
            score = self.edges[u, v]
            inner = "" if end(v) == v else Address.parse(v).inner or ""
            found.add_edge(u, end(v), input=inner, **({} if score is None else {"score": float(score)}))
        return found

    def dot(self) -> str:
        """What is kept in the language of Graphviz, the layers as ranks."""
        graph = self.graph()
        lines = ["digraph circuit {", "  rankdir=BT;", "  node [shape=box];"]
        layers: dict[object, list[str]] = {}
        for node, known in graph.nodes(data=True):
            label = node if "score" not in known else f"{node}\\n{amount(known['score'], 3)}"
            lines.append(f'  "{node}" [label="{label}"];')
            layers.setdefault((known.get("layer"), Address.parse(node).part), []).append(node)
        lines += ["  {rank=same; " + " ".join(f'"{node}";' for node in same) + "}" for same in layers.values()]
        for u, v, known in graph.edges(data=True):
            label = " ".join(filter(None, [known["input"], amount(known["score"], 3) if "score" in known else ""]))
            lines.append(f'  "{u}" -> "{v}" [label="{label}"];')
        return "\n".join([*lines, "}", ""])

    def summary(self) -> str:
        """A few lines: what is kept of what, by which method, and the items of the largest scores."""
        lines = [f"{len(self)} of {len(self.scores)} {self.noun} ({self.level}) by {self.method}"]
        if self.scored:
            lines += [f"  {said(item)}: {amount(self.scores[item], 3)}" for item in self.ranking()[:5]
                      if item in self.kept]
        return "\n".join(lines)

    # -- files --------------------------------------------------------------------------------------------------------

    def _lines(self) -> DataFrame:
        return self.frame()

    def tree(self) -> dict:
        """Plain data."""
        places = {item: place for place, item in enumerate(self.scores)}
        return {"nodes": dict(self.nodes), "edges": [[*edge, score] for edge, score in self.edges.items()],
                "level": self.level, "method": self.method, "about": dict(self.about),
                "kept": sorted(places[item] for item in self.kept)}

    @classmethod
    def from_tree(cls, data: Mapping) -> Self:
        """The circuit that has this tree. Raises: KeyError, TypeError, IndexError or AttributeError for what has none.
        """
        edges = {(u, v): score for u, v, score in data["edges"]}
        items: Sequence[Item] = [*(edges or data["nodes"])]
        kept = frozenset(items[place] for place in data["kept"])
        return cls(dict(data["nodes"]), edges, data["level"], data["method"], dict(data["about"]), kept)

    def _write(self, path: Path, suffix: str) -> None:
        """Besides .json, everything, and .csv, the table: .graphml and .dot, what is kept as a graph."""
        if suffix == ".dot":
            path.write_text(self.dot(), encoding="utf-8")
        elif suffix == ".graphml":
            from networkx import generate_graphml

            path.write_text("\n".join(generate_graphml(self.graph())), encoding="utf-8")
        else:
            super()._write(path, suffix)


def said(item: Item) -> str:
    """An item as text.

    >>> said("L5.attn.H3"), said(("L0.mlp", "L5.attn.H3.q"))
    ('L5.attn.H3', 'L0.mlp -> L5.attn.H3.q')
    """
    return item if isinstance(item, str) else ARROW.join(item)


def owner(destination: str) -> str:
    """The node that an input belongs to.

    >>> owner("L5.attn.H3.q"), owner("L5.attn.H3.v@-1"), owner("L5.mlp"), owner("logits")
    ('L5.attn.H3', 'L5.attn.H3@-1', 'L5.mlp', 'logits')
    """
    place, at, position = destination.partition("@")
    head, _, inner = place.rpartition(".")
    return f"{head if inner in ('q', 'k', 'v') else place}{at}{position}"


def _reached(starts: Collection[str], links: Sequence[Edge]) -> set[str]:
    """What can be come to from `starts`, along these links."""
    onward: dict[str, list[str]] = {}
    for u, v in links:
        onward.setdefault(u, []).append(v)
    found, waiting = set(starts), list(starts)
    while waiting:
        fresh = [node for node in onward.get(waiting.pop(), ()) if node not in found]
        found.update(fresh)
        waiting += fresh
    return found
