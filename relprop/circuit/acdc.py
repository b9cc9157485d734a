"""Automated circuit discovery (Conmy et al. 2023): edges are tried one after the other, and those go that are not
missed.

From the logits back to the input: an edge is cut on top of all that are cut already, and stays cut if the measure gets
worse by less than tau. What no kept edge leaves is not asked: all that leads there goes.

What stays depends on the order, which is fixed here: destinations from the logits to the first layer, in a layer its
MLP before its heads, heads from the last to the first, of each the values, keys and queries; for each destination
sources from the last to the embedding. (Conmy et al. leave the order open; of the same model and tau, auto-circuit
keeps other edges from one Python process to the next, since it takes them from a set.)

Reference: Conmy et al. 2023 (Towards automated circuit discovery for mechanistic interpretability), algorithm 1.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor
from tqdm import tqdm

from ..address import Address
from ..mediation import KL
from ..mediation.task import ready
from ..result import Circuit
from ..result.circuit import owner
from .run import Edge, Pieces
from .task import Prepared

MEASURES = ("KL", "metric")


def acdc(prepared: Prepared, *, level: str, ablation: str, tau: float = 0.05, measure: str = "KL",
         order: Sequence[Edge] | None = None, batch_size: int | None = None, show_progress: bool = False) -> Circuit:
    """The edges that are left, kept, and every edge with what the measure changed by when it was tried; 0 where it was
    not, since nothing that is kept leaves its destination.

    Cost: for each edge that is tried, a forward pass from the layer that it ends in. Edges that wait are tried together
    on the guess that the first of them fare as the last one did, and again where it was wrong: the result is that of
    one after the other.

    Args:
        tau: how much worse the measure may get by an edge, in its unit, above 0.
        measure: "KL" divergence of the answer from the clean run's, mean over the rows; or the task's "metric", which
            is worse the nearer it is to that of the corrupted inputs.
        order: of all edges, in which they are tried; None: the one above.
    Raises: ValueError for a tau that is not above 0, another measure, or an order that is not one of all edges.

    >>> import transformers
    >>> from relprop.circuit import Task, circuit
    >>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9, n_positions=8)
    >>> task = Task("words", torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]]), metric=5)
    >>> model = transformers.GPT2LMHeadModel(config).eval()
    >>> found = circuit(model, task, "acdc", level="edges", options={"tau": 100.0})
    >>> len(found.scores), len(found), found.about["tried"]  # all go, and what leads nowhere is not tried
    (13, 0, 4)
    """
    if not tau > 0:
        raise ValueError(f"tau is {tau}; give a number above 0: what the measure may get worse by for one edge")
    if measure not in MEASURES:
        raise ValueError(f"no measure {measure!r}; there are {', '.join(MEASURES)}")
    with ready(prepared.model):
        search = _Search.of(prepared, ablation, measure, batch_size)
        edges = search.order() if order is None else [tuple(edge) for edge in order]
        if sorted(edges) != sorted(search.places):
            raise ValueError(f"an order of {len(set(edges))} edges of a model of {len(search.places)}; give each once")
        with tqdm(total=len(edges), disable=not show_progress, unit="edge") as bar:
            for group in _groups(edges):
                search.tried(group, tau, bar)
    kept = frozenset(edge for edge in search.places if not search.cut[search.places[edge]])
    scores = {edge: search.scores.get(edge, 0.0) for edge in search.places}
    about = {"tau": tau, "measure": measure, "tried": len(search.scores), "of the circuit": search.sign * search.now}
    return Circuit.of(scores, level="edges", method="acdc", kept=kept, about=about)


def _groups(edges: Sequence[Edge]) -> Iterator[list[Edge]]:
    """Edges in order, those together that end in heads of one layer, or in one other destination."""
    def ends(edge: Edge) -> tuple[str, int | None]:
        place = Address.parse(edge[1])
        return place.part, place.layer

    return (list(group) for _, group in groupby(edges, ends))


@dataclass
class _Search:
    """How far the search has come: what is `cut`, bool (D, S), and how bad the measure is `now`, `sign` times it."""

    pieces: Pieces
    sign: float
    cut: Tensor
    places: dict[Edge, tuple[int, int]]
    scores: dict[Edge, float]
    now: float = 0.0
    cuts: bool = True  # what became of the last edge
    many: int = 1  # how many are tried together

    @staticmethod
    def of(task: Prepared, ablation: str, measure: str, batch_size: int | None) -> _Search:
        sign = 1.0
        if measure == "KL":
            outcome = KL()
            task = replace(task, outcome=outcome, questions=outcome.pairs(task.subject, task.clean, task.corrupted)[0])
        else:
            clean, corrupted = (float(one.mean()) for one in task.measured)
            sign = -1.0 if clean > corrupted else 1.0
        pieces = Pieces(task, ablation, hold=True, batch_size=batch_size)
        graph = pieces.wired.graph
        places = {edge: (d, s) for edge, (s, d) in zip(graph.pairs(), graph.edges.nonzero().tolist())}
        found = _Search(pieces, sign, torch.zeros(graph.edges.T.shape, dtype=torch.bool), places, {})
        found.now = float(found.measured(found.cut[None])[0])
        return found

    def measured(self, cut: Tensor) -> Tensor:
        """How bad the measure is with these edges cut, (C,): mean over the rows."""
        return self.sign * self.pieces.run(cut).mean(1)

    def order(self) -> list[Edge]:
        """All edges, from the logits to the embedding."""
        graph = self.pieces.wired.graph
        back = {name: place for place, name in enumerate(graph.names[0])}

        def key(edge: Edge) -> tuple:
            place = Address.parse(edge[1])
            layer = float("inf") if place.layer is None else place.layer
            return -layer, place.part != "mlp", -(place.index or 0), "vkq".find(place.inner or " "), -back[edge[0]]

        return sorted(self.places, key=key)

    def leads(self, edge: Edge) -> bool:
        """Whether anything that is kept leaves the node that an edge ends in."""
        node = owner(edge[1])
        names = self.pieces.wired.graph.names[0]
        if node not in names:
            return True  # the logits
        source = names.index(node)
        return bool((self.pieces.wired.graph.edges[source] & ~self.cut[:, source]).any())

    def tried(self, group: Sequence[Edge], tau: float, bar: tqdm) -> None:
        """Tries these edges one after the other, as far as they lead anywhere."""
        waiting = []
        for edge in group:
            if self.leads(edge):
                waiting.append(edge)
            else:
                self.cut[self.places[edge]] = True
                bar.update()
        while waiting:
            some = waiting[:self.many]
            cut = self.cut.expand(len(some), -1, -1).clone()
            for index, edge in enumerate(some):
                cut[index if not self.cuts else slice(index, None), *self.places[edge]] = True
            guess, right = self.cuts, 0
            for edge, worse in zip(some, self.measured(cut).tolist()):
                self.scores[edge] = self.sign * (worse - self.now)
                self.cuts, right = worse - self.now < tau, right + 1
                if self.cuts:
                    self.cut[self.places[edge]], self.now = True, worse
                if self.cuts != guess:
                    break
            self.many = min(2 * self.many, 64) if self.cuts == guess else max(1, self.many // 2)
            waiting = waiting[right:]
            bar.update(right)


__all__ = ["MEASURES", "acdc"]
