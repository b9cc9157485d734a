"""Whether a circuit does the task: the model is run with all else ablated, which is apart from how the circuit was
found.

    >>> import torch, transformers
    >>> from relprop.circuit import Task, circuit
    >>> config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=9, n_positions=8)
    >>> model = transformers.GPT2LMHeadModel(config).eval()
    >>> task = Task("words", torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]]), metric=5)
    >>> found = circuit(model, task, method="random")
    >>> measured = faithfulness(model, task, {"all": found, "none": found.top(0)})
    >>> measured.share.round(decimals=6).abs().tolist()
    [1.0, 0.0]

What an ablation puts in the place of what is left out is part of every result: the same circuit may be faithful under
one and not under another (Miller et al. 2024). References: Wang et al. 2023 (Interpretability in the wild) for
faithfulness, completeness and minimality; Hsu et al. 2024 (Efficient automated circuit discovery in transformers using
contextual decomposition); Mueller et al. 2025 (MIB: a mechanistic interpretability benchmark) for CPR and CMD; Miller
et al. 2024 (Transformer circuit faithfulness metrics are not robust).
"""
from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..check.statistics import LEVEL
from ..data import Pairs
from ..errors import Undefined
from ..numerics import tolerance
from ..result import Circuit, Faithfulness
from ..result.circuit import Item, said
from ..subject import Subject
from .run import outcomes
from .task import Prepared, Task, check_ablation, posed

if TYPE_CHECKING:
    from pandas import DataFrame

Model = str | Subject | nn.Module | tuple
Asked = Task | Pairs | str | Prepared
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Of all items, at which MIB measures circuits."""
RESAMPLES = 2000


def faithfulness(subject: Model, task: Asked, circuits: Circuit | Sequence[Circuit] | Mapping[str, Circuit], *,
                 metric: object = None, ablation: str | None = None, batch_size: int | None = None, seed: int = 0
                 ) -> Faithfulness:
    """The metric of circuits, with all that they leave out ablated, beside that of the whole model and of nothing of
    it.

    Args: circuits: of the same items; names are for tables. metric: another one than the task's, such as
            `relprop.mediation.KL()`. ablation: of `relprop.circuit.ABLATIONS`; None: the one that they were found with.
        batch_size: rows run at once. seed: of the interval over inputs.
    Raises: ValueError for circuits of unlike items; Undefined where the metric of the whole model is that of nothing.
    """
    named = dict(circuits) if isinstance(circuits, Mapping) else \
        {"circuit": circuits} if isinstance(circuits, Circuit) else {str(row): one for row, one in enumerate(circuits)}
    items, ablation = common(list(named.values()), ablation)
    prepared = posed(subject, task, metric=metric, seed=seed)
    outcome, full, empty = run(prepared, [one.kept for one in named.values()], items, ablation, batch_size)
    low, high = intervals(outcome, full, empty, seed=seed)
    about = {"ablation": ablation, "metric": prepared.outcome.name(prepared.subject), "task": prepared.task.name,
             "model": prepared.subject.name, "methods": [one.method for one in named.values()]}
    kept = torch.tensor([len(one) for one in named.values()])
    return Faithfulness(tuple(named), outcome, full, empty, kept, len(items), low, high, about=about)


def curve(subject: Model, task: Asked, circuit: Circuit, *, fractions: Sequence[float] | str = FRACTIONS,
          absolute: bool = True, prune: bool = True, metric: object = None, ablation: str | None = None,
          batch_size: int | None = None, seed: int = 0) -> Faithfulness:
    """Faithfulness over the size of the circuit: of the int(p n) items that rank highest of n, for rising p.

    Its `cpr` is MIB's CPR with `absolute` false, its `cmd` MIB's CMD with `absolute` true.

    Args: circuit: with a score for each item. fractions: p, rising; or "all", each size from none to all items.
        absolute: rank by the size of scores; else by what they add to the total change, see `Circuit.ranking`. prune:
            leave out edges that are on no way from the input to the logits. The others as of `faithfulness`.
    Raises: ValueError for fractions that do not rise within 0 to 1, and as of `Circuit.ranking` and `faithfulness`.
    """
    n = len(circuit.scores)
    chosen = [size / n for size in range(n + 1)] if fractions == "all" else list(map(float, fractions))
    if not chosen or sorted(set(chosen)) != chosen or not 0 <= chosen[0] <= chosen[-1] <= 1:
        raise ValueError(f"fractions are rising shares of all items, from 0 to 1, or 'all'; got {fractions!r}")
    order = circuit.ranking(absolute=absolute)
    sizes = range(n + 1) if fractions == "all" else [int(share * n) for share in chosen]
    found = [circuit.keep(order[:size]) for size in sizes]
    found = [one.prune() for one in found] if prune else found
    made = faithfulness(subject, task, {f"{share:g}": one for share, one in zip(chosen, found)}, metric=metric,
                        ablation=ablation, batch_size=batch_size, seed=seed)
    about = {**made.about, "ranking": "absolute" if absolute else "signed", "prune": prune, "methods": [circuit.method]}
    return Faithfulness(**{**vars(made), "fractions": torch.tensor(chosen, dtype=torch.float64), "about": about})


def common(circuits: Sequence[Circuit], ablation: str | None) -> tuple[list[Item], str]:
    """The items that circuits are made of, and the ablation of all.

    Raises: ValueError for none, for circuits of unlike items, or found with unlike ablations where none is given.
    """
    if not circuits:
        raise ValueError("no circuit to evaluate; give at least one")
    items = list(circuits[0].scores)
    other = next((one for one in circuits if one.scores.keys() != circuits[0].scores.keys()), None)
    if other is not None or not items:
        raise ValueError(f"circuits are compared where they are made of the same items, and one is of {len(items)} "
                         f"{circuits[0].noun}, another of {0 if other is None else len(other.scores)}")
    known = {one.about.get("ablation", "resample") for one in circuits}
    if ablation is None and len(known) > 1:
        raise ValueError(f"the circuits were found with the ablations {', '.join(sorted(known))}; say ablation= by "
                         "which all are evaluated")
    return items, check_ablation(known.pop() if ablation is None else ablation)


def run(prepared: Prepared, kept: Sequence[Collection[Item]], items: Sequence[Item], ablation: str,
        batch_size: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The metric of circuits, (N, B), of the whole model and of nothing of it, (B,) each.

    Raises: Undefined where the metric is equal on both, so that nothing is a share of anything.
    """
    found = outcomes(prepared, [*kept, items, []], among=items, ablation=ablation, batch_size=batch_size).double()
    full, empty = found[-2], found[-1]
    scale = max(float(full.abs().max()), float(empty.abs().max()))
    if not float((full - empty).abs().max()) > 1e-3 * tolerance(prepared.subject.dtype) * scale:
        raise Undefined(f"{prepared.outcome.name(prepared.subject)} is {float(full.mean()):.4g} for the whole model "
                        f"and the same with all {len(items)} items ablated ({ablation}), so that no circuit of them "
                        "does more than another; take another level, ablation or metric")
    return found[:-2], full, empty


def intervals(outcome: Tensor, full: Tensor, empty: Tensor, *, seed: int = 0, resamples: int = RESAMPLES
              ) -> tuple[Tensor | None, Tensor | None]:
    """Percentile bootstrap over inputs of faithfulness, (N,) each; None with one input."""
    if len(full) < 2:
        return None, None
    drawn = redrawn(len(full), resamples, seed=seed)
    share = ((outcome - empty) @ drawn.T) / ((full - empty) @ drawn.T)  # (N, resamples)
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(share, ends, dim=1)
    return low, high


def redrawn(count: int, resamples: int, *, seed: int = 0) -> Tensor:
    """Weights of inputs that are drawn anew, (resamples, count), each row of sum 1."""
    import numpy as np

    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return torch.from_numpy(drawn / count)


# -- completeness and minimality ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Completeness:
    """For each knocked-out set K: the metric of the circuit without K and of the whole model without K, (K, B).

    `gap` is |F(C - K) - F(M - K)| of the means, (K,), `share` the same over what the model does, |m(full) - m(empty)|:
    0 where the circuit has all that the model has for the task.
    """

    sets: tuple[frozenset[Item], ...]
    circuit: Tensor
    model: Tensor
    full: Tensor
    empty: Tensor
    about: dict

    @property
    def gap(self) -> Tensor:
        return (self.circuit.mean(1) - self.model.mean(1)).abs()

    @property
    def share(self) -> Tensor:
        return self.gap / (self.full.mean() - self.empty.mean()).abs()

    @property
    def worst(self) -> frozenset[Item]:
        """The set with the largest gap."""
        return self.sets[int(self.gap.argmax())]

    def frame(self) -> DataFrame:
        """One row a set."""
        from pandas import DataFrame

        return DataFrame({"set": [" ".join(map(said, sorted(one, key=said))) for one in self.sets],
                          "circuit": self.circuit.mean(1).tolist(), "model": self.model.mean(1).tolist(),
                          "gap": self.gap.tolist(), "share": self.share.tolist()})


def completeness(subject: Model, task: Asked, circuit: Circuit, *, sets: Sequence[Collection[Item]] | None = None,
                 count: int = 20, ablation: str | None = None, batch_size: int | None = None, seed: int = 0
                 ) -> Completeness:
    """Whether the circuit without a part behaves as the model without it (Wang et al. 2023, section 4.2): a model that
    has the same thing in two places does not.

    Args: sets: of items of the circuit, to be knocked out; None: `count` random ones, each item in with chance 1/2,
            the empty one not.
    Raises: ValueError for an empty circuit, or a set that is not in it.
    """
    items, ablation = common([circuit], ablation)
    _several(circuit, "completeness")
    chosen = _halves(circuit, count, seed) if sets is None else [frozenset(one) for one in sets]
    outside = next((item for one in chosen for item in one if item not in circuit.kept), None)
    if outside is not None or not chosen:
        raise ValueError(f"{'no set' if outside is None else said(outside)} to knock out of a circuit that keeps "
                         f"{len(circuit)} {circuit.noun}; give sets of these")
    prepared = posed(subject, task, seed=seed)
    kept = [*(circuit.kept - one for one in chosen), *(frozenset(items) - one for one in chosen)]
    found, full, empty = run(prepared, kept, items, ablation, batch_size)
    return Completeness(tuple(chosen), found[:len(chosen)], found[len(chosen):], full, empty, {"ablation": ablation})


@dataclass(frozen=True, eq=False)
class Minimality:
    """What each item of a circuit adds: `change` is the largest |F(C - K - v) - F(C - K)| over the sets K that were
    tried, (N,), `alone` that with nothing else knocked out, both over what the model does, |m(full) - m(empty)|.
    """

    items: tuple[Item, ...]
    change: Tensor
    alone: Tensor
    about: dict

    def needless(self, below: float) -> list[Item]:
        """The items that add less than this share, whatever else is knocked out."""
        return [item for item, change in zip(self.items, self.change.tolist()) if change < below]

    def frame(self) -> DataFrame:
        """One row an item."""
        from pandas import DataFrame

        return DataFrame({"change": self.change.tolist(), "alone": self.alone.tolist()},
                         index=list(map(said, self.items))).rename_axis("item")


def minimality(subject: Model, task: Asked, circuit: Circuit, *, count: int = 5, ablation: str | None = None,
               batch_size: int | None = None, seed: int = 0) -> Minimality:
    """Whether every item of the circuit is needed: for each there should be a set K without which it changes the metric
    (Wang et al. 2023, section 4.3).

    Args: count: random sets K that are tried for each item, besides none; each other item in with chance 1/2.
    Raises: ValueError for an empty circuit.
    """
    items, ablation = common([circuit], ablation)
    _several(circuit, "minimality")
    prepared = posed(subject, task, seed=seed)
    sets = [frozenset(), *(_halves(circuit, count, seed) if count else [])]
    own = tuple(circuit)
    kept = [circuit.kept - one - {item} for one in sets for item in own] \
        + [(circuit.kept - one) | {item} for one in sets for item in own]
    distinct = list(dict.fromkeys(kept))  # many are asked for several times
    found, full, empty = run(prepared, distinct, items, ablation, batch_size)
    mean = dict(zip(distinct, found.mean(1)))
    values = torch.stack([mean[one] for one in kept]).view(2, len(sets), len(own))
    change = (values[0] - values[1]).abs() / (full.mean() - empty.mean()).abs()
    return Minimality(own, change.amax(0), change[0], {"ablation": ablation, "sets": len(sets)})


def _halves(circuit: Circuit, count: int, seed: int) -> list[frozenset[Item]]:
    """Random sets of items of a circuit, each with chance 1/2, none of them empty."""
    generator, own = torch.Generator().manual_seed(seed), list(circuit)
    chosen = torch.rand(count, len(own), generator=generator) < 0.5
    first = torch.randint(len(own), (count,), generator=generator)
    return [frozenset(item for item, inside in zip(own, row.tolist()) if inside) or frozenset([own[at]])
            for row, at in zip(chosen, first.tolist())]


def _several(circuit: Circuit, what: str) -> None:
    if not len(circuit):
        raise ValueError(f"{what} is of the items that a circuit keeps, and this one keeps none of "
                         f"{len(circuit.scores)}; narrow it with top(n) or threshold(x)")


__all__ = ["FRACTIONS", "Completeness", "Minimality", "common", "completeness", "curve", "faithfulness", "intervals",
           "minimality", "redrawn", "run"]
