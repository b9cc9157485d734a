"""The model run with only a circuit left as it is: every other node or edge is ablated.

An edge from u to v is cut where v reads the ablated value of u in the place of the one that u has in this run:
input(v) = sum over kept edges of a_u + sum over cut ones of a'_u, where a_u is what u gives in the run with the cuts
(Conmy et al. 2023; Miller et al. 2024). Queries, keys and values of single heads have inputs of their own, for which
the model's own norm and projections are run on a stream of their own; equal streams are run once. With all edges kept
it is the clean run, with all cut the corrupted one's output (of resample ablation).

Many circuits are run together, side by side in the batch, and each from the first layer in which any is cut.

References: Conmy et al. 2023 (Towards automated circuit discovery for mechanistic interpretability); Miller et al. 2024
(Transformer circuit faithfulness metrics are not robust).
"""
from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..mediation.experiment import TAKEN, experiment
from ..mediation.memory import PIECE
from ..mediation.sweep import Mediator, sweep
from ..mediation.task import mediators_of, ready
from .ablated import ablated
from .piece import Edge, Item, Piece, Pieces, Report, check_items
from .task import ABLATIONS, Prepared, check_ablation


def outcomes(task: Prepared, circuits: Sequence[Collection[Item]], *, among: Collection[Item] | None = None,
             ablation: str = "resample", batch_size: int | None = None, report: Report | None = None) -> Tensor:
    """The metric of each circuit run alone on the clean inputs, (N, B), float64: what is left out is ablated.

    Args:
        circuits: what each keeps: nodes, "L5.attn.H3", "L2.mlp@-1", "L4.mlp.N7", or edges, ("L2.mlp", "L5.attn.H3.q").
        among: the nodes or edges that a circuit is a part of; what is in neither stays as it is. None: all edges of
            the model, of which an edge may be cut at some positions alone, (u, "L5.attn.H3.q@-1").
        ablation: "resample", "mean", "mean by position" or "zero"; see `relprop.circuit.ablated`.
        batch_size: rows run at once; None: as many as there is room for. report: called with how many are done.
    Raises: ValueError for an item that is none of `among`, nodes without `among`, or edges of a model of two streams.

    >>> import transformers
    >>> from relprop.circuit import Task
    >>> from relprop.subject import Subject
    >>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=4, vocab_size=9, n_positions=8)
    >>> subject = Subject.from_module(transformers.GPT2LMHeadModel(config).eval())
    >>> task = Task("words", torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]]), metric=5).prepared(subject)
    >>> kept = [("embed", "L0.attn.H1.v"), ("L0.attn.H1", "logits"), ("embed", "logits")]
    >>> outcomes(task, [kept, kept[:2], []]).shape
    torch.Size([3, 1])
    """
    circuits = [list(circuit) for circuit in circuits]
    given = [item for circuit in circuits for item in circuit] if among is None else list(among)
    of_nodes = any(isinstance(item, str) for item in given)
    if of_nodes and among is None:
        raise ValueError("circuits of nodes are part of some: give among=, all nodes of the level")
    with ready(task.model):
        if of_nodes:
            return _nodes(task, circuits, list(among), ablation, batch_size, report)
        pieces = Pieces(task, ablation, batch_size=batch_size)
        cut = pieces.cuts(circuits, among)
        return pieces.run(cut, report)


# -- nodes ------------------------------------------------------------------------------------------------------------


def _nodes(task: Prepared, circuits: list[list[str]], among: list[str], ablation: str, batch_size: int | None,
           report: Report | None) -> Tensor:
    spots = mediators_of(task.subject, task.clean, {name: name for name in among})
    check_items(circuits, among)
    left_out = [[spot for name in among if name not in kept for spot in spots[name]] for kept in map(set, circuits)]
    return swept(task, left_out, ablation, batch_size=batch_size, report=report)


def swept(task: Prepared, sets: Sequence[Mediator], ablation: str = "resample", *, denoise: bool = False,
          batch_size: int | None = None, report: Report | None = None) -> Tensor:
    """The metric of the clean inputs with each set of places ablated together, (N, B), float64; what no place can reach
    is computed once.

    Args: denoise: of the corrupted inputs with each set as in the clean run, in the place of that.
    Raises: ValueError for another ablation than "resample" with `denoise`.
    """
    check_ablation(ablation, ABLATIONS[:1] if denoise else ABLATIONS)
    sets = [list(places) for places in sets]
    some = [index for index, places in enumerate(sets) if places]
    spots = list(dict.fromkeys(spot for places in sets for spot in places))
    gone = None if ablation == "resample" else ablated(task, [spot.tap for spot in spots], ablation)
    found = task.measured[denoise].expand(len(sets), -1).clone()
    for rows in torch.arange(task.rows).split(PIECE) if some else ():
        mine = task.take(rows)
        made = experiment(mine.subject, mine.outcome, [mine.questions], spots, natural=gone is None, both=denoise,
                          batch_size=batch_size, places=mine.places)
        chosen = [sets[index] for index in some]
        if gone is None:
            answers = (made.direct if denoise else made.indirect)(chosen, report)
        else:
            here = made.stages[0][0]
            values = {tap: value[rows][:, here.offset:] for tap, value in gone.items()}
            answers = mine.outcome.value([sweep(here, chosen, TAKEN, values, batch_size=batch_size,
                                                places=mine.places, report=report).double()])
        found[torch.tensor(some)[:, None], rows] = answers
    return found


__all__ = ["Edge", "Item", "Piece", "Pieces", "Report", "outcomes", "swept"]
