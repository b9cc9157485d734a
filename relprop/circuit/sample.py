"""Random circuits of the items of one: sets of nodes or edges, or ways from the input to the logits."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from ..result import Circuit
from ..result.circuit import Edge, Item


def random_circuits(circuit: Circuit, count: int, *, size: int, paths: bool = False, seed: int = 0
                    ) -> list[frozenset[Item]]:
    """`count` random sets of `size` items; with `paths`, of edges on ways from the input to the logits.

    Raises: ValueError for paths of a circuit of nodes.

    >>> known = Circuit.of([f"L0.attn.H{head}" for head in range(4)], level="heads")
    >>> [len(one) for one in random_circuits(known, 2, size=3)]
    [3, 3]
    """
    generator = torch.Generator().manual_seed(seed)
    items = list(circuit.scores)
    if not paths:
        return [frozenset(items[at] for at in torch.randperm(len(items), generator=generator)[:size].tolist())
                for _ in range(count)]
    walk = partial(_walk, _onward(circuit), circuit.ending(), generator)
    return [_of_paths(walk, size) for _ in range(count)]


def inflated(circuit: Circuit, count: int, *, seed: int = 0) -> list[tuple[frozenset[Item], Item]]:
    """The circuit with something random added, and what of it is to be removed again, up to `count` times: nodes once
    each, of edges a way from the input to the logits that is not in the circuit yet, and one of its new edges.

    Raises: ValueError where nothing is left to be added.
    """
    generator = torch.Generator().manual_seed(seed)
    outside = [item for item in circuit.scores if item not in circuit.kept]
    if not outside:
        raise ValueError(f"the circuit is all of {len(circuit)} {circuit.noun}, so that nothing can be added to it; "
                         "narrow it with top(n) or threshold(x)")
    if not circuit.edges:
        order = torch.randperm(len(outside), generator=generator)[:count].tolist()
        return [(circuit.kept | {outside[at]}, outside[at]) for at in order]
    walk, found = partial(_walk, _onward(circuit), circuit.ending(), generator), []
    for _ in range(100 * count):
        path = walk()
        fresh = [edge for edge in path if edge not in circuit.kept]
        if fresh:
            found.append((circuit.kept | set(path), fresh[_draw(len(fresh), generator)]))
        if len(found) == count:
            break
    if not found:
        raise ValueError("every way from the input to the logits is in the circuit already, so that there is "
                         "nothing to add")
    return found


def _of_paths(walk: Callable[[], list[Edge]], size: int) -> frozenset[Edge]:
    """Edges of random ways until there are `size`; the last way is cut behind as many as fit, its end first."""
    found: dict[Edge, None] = {}
    while len(found) < size:
        path = [edge for edge in walk() if edge not in found]
        found.update(dict.fromkeys(path[::-1][:size - len(found)]))
    return frozenset(found)


def _walk(onward: Mapping[str, Sequence[Edge]], end: Callable[[str], str], generator: torch.Generator) -> list[Edge]:
    """A random way from the input to the logits, each edge out of a node as likely as the others."""
    starts = [node for node in onward if node.partition("@")[0] == "embed"]
    at, path = starts[_draw(len(starts), generator)], []
    while at in onward:
        path.append(onward[at][_draw(len(onward[at]), generator)])
        at = end(path[-1][1])
    return path


def _onward(circuit: Circuit) -> dict[str, list[Edge]]:
    """The edges out of each node from which the logits can be reached."""
    if not circuit.edges:
        raise ValueError("ways from the input to the logits are of edges, and this is a circuit of nodes")
    whole = circuit.keep(circuit.edges).prune()
    onward: dict[str, list[Edge]] = {}
    for u, v in whole:
        onward.setdefault(u, []).append((u, v))
    if not any(node.partition("@")[0] == "embed" for node in onward):
        raise ValueError("no edge of this circuit leaves embed, so that no way starts at the input")
    return onward


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
