"""Tests that tell a circuit from a lucky one: against random circuits, and the hypothesis tests of Shi et al.

    >>> import torch, transformers
    >>> from relprop.circuit import Task, circuit
    >>> config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=9, n_positions=8)
    >>> model = transformers.GPT2LMHeadModel(config).eval()
    >>> task = Task("words", torch.tensor([[1, 2, 3], [2, 1, 3]]), torch.tensor([[1, 4, 3], [5, 1, 3]]), metric=5)
    >>> found = circuit(model, task, method="random")
    >>> against_random(model, task, found.top(2), count=6).random.shape
    torch.Size([6])

Every test is of the model run with all ablated that a circuit leaves out; what is ablated, and how, decides with the
circuit (Miller et al. 2024). References: Hsu et al. 2024 (CD-T) for the comparison with random circuits; Shi et al.
2024 (Hypothesis testing the circuit hypothesis in LLMs); Gretton et al. 2007 (A kernel statistical test of
independence); B. Phipson and G. Smyth, "Permutation P-values Should Never Be Zero", 2010.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..check.statistics import LEVEL, holm, p_value
from ..errors import Undefined
from ..result import Circuit
from ..result.circuit import Item, said
from .evaluation import Asked, Model, common, redrawn, run
from .sample import inflated, random_circuits
from .task import posed

if TYPE_CHECKING:
    from pandas import DataFrame

EPSILON = 0.1  # how far from a half still counts as equivalent
QUANTILE = 0.9  # of random circuits that a circuit should beat
RANDOMS = 100
PERMUTATIONS = 1000
RESAMPLES = 1000
ENDS = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)


# -- against random circuits -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Chance:
    """A circuit's faithfulness beside that of random circuits of `size` items, (N,).

    `beaten` is the share of random circuits that are less faithful, `low` and `high` its 95 % interval over the inputs;
    `p` is (1 + how many are as faithful) / (N + 1).
    """

    value: float
    random: Tensor
    size: int
    beaten: float
    low: float | None
    high: float | None
    p: float


def against_random(subject: Model, task: Asked, circuit: Circuit, *, count: int = 200, size: int | None = None,
                   paths: bool = False, ablation: str | None = None, batch_size: int | None = None, seed: int = 0
                   ) -> Chance:
    """The circuit against random ones of the same number of items.

    Args: count: random circuits. size: of these, items; None: as many as the circuit keeps. paths: of edges, random
            ways from the input to the logits until there are enough, so that nothing hangs loose. The others as of
            `relprop.circuit.evaluation.faithfulness`.
    Raises: ValueError for an empty circuit, or one of everything, which no random one differs from.
    """
    items, ablation = common([circuit], ablation)
    size = len(circuit) if size is None else size
    _differs(circuit, size)
    others = random_circuits(circuit, count, size=size, paths=paths, seed=seed)
    found, full, empty = run(posed(subject, task, seed=seed), [circuit.kept, *others], items, ablation, batch_size)
    share = lambda weights: ((found - empty) @ weights.T) / ((full - empty) @ weights.T)  # (1 + N, ...)
    value = share(torch.full((1, len(full)), 1 / len(full), dtype=torch.float64))[:, 0]
    low = high = None
    if len(full) > 1:
        again = share(redrawn(len(full), RESAMPLES, seed=seed))
        beaten = (again[1:] < again[:1]).double().mean(0)
        low, high = torch.quantile(beaten, ENDS).tolist()
    return Chance(float(value[0]), value[1:], size, float((value[1:] < value[0]).double().mean()), low, high,
                  p_value(float(value[0]), value[1:]))


def random_curve(subject: Model, task: Asked, circuit: Circuit, *, count: int = 10,
                 fractions: Sequence[float] = tuple(tenth / 10 for tenth in range(1, 11)), paths: bool = False,
                 ablation: str | None = None, batch_size: int | None = None, seed: int = 0) -> list[Chance]:
    """The circuit against random ones of these shares of all items, as Hsu et al. 2024 draw it: a circuit "more
    faithful than 80 % of random circuits up to 60 % of the model" has `beaten` of at least 0.8 for all fractions up to
    0.6.

    Raises: as `against_random`, and ValueError for a fraction that is none.
    """
    if any(not 0 < share <= 1 for share in fractions):
        raise ValueError(f"fractions are shares of all items, above 0 and up to 1; got {list(fractions)}")
    sizes = [max(1, round(share * len(circuit.scores))) for share in fractions]
    return [against_random(subject, task, circuit, count=count, size=size, paths=paths, ablation=ablation,
                           batch_size=batch_size, seed=seed + index) for index, size in enumerate(sizes)]


# -- the tests of Shi et al. -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a test says: `statistic` and the p-value of `hypothesis`, which is rejected where `p` is below the level.

    `low`, `high`: 95 % interval of the statistic over the inputs, None where it is of no inputs. `good`: whether a
    circuit that does the task is one of which the hypothesis is not rejected (True), or is (False).
    """

    test: str
    hypothesis: str
    statistic: float
    p: float
    good: bool
    low: float | None = None
    high: float | None = None

    def passed(self, level: float = 0.05) -> bool:
        """Whether the test speaks for the circuit."""
        return (self.p >= level) == self.good


def equivalence(subject: Model, task: Asked, circuit: Circuit, *, epsilon: float = EPSILON, ablation: str | None = None,
                batch_size: int | None = None, seed: int = 0) -> Verdict:
    """Whether the circuit beats the model on about half of the inputs (Shi et al. 2024, section 3.1).

    The statistic is the share s of inputs on which the metric of the circuit is above the model's, equal ones counting
    half; see `equivalence_p`. The published code passes the mean difference of the metric in its place, which is no
    share.

    Raises: ValueError for an empty circuit.
    """
    items, ablation = common([circuit], ablation)
    _kept(circuit)
    found, full, _ = run(posed(subject, task, seed=seed), [circuit.kept], items, ablation, batch_size)
    above = (found[0] > full).double() + 0.5 * (found[0] == full).double()
    low, high = _interval(above, seed)
    share = float(above.mean())
    return Verdict("equivalence", f"the circuit beats the model on between {0.5 - epsilon:g} and {0.5 + epsilon:g} of "
                   "inputs", share, equivalence_p(len(above), epsilon, share), True, low, high)


def equivalence_p(n: int, epsilon: float, observed: float) -> float:
    """Chance of a share at least as far from a half, sum over k with |k/n - 1/2| >= |observed - 1/2| of Binomial(k; n,
    1/2 + epsilon) (Shi et al. 2024, eq. 4).

    >>> round(equivalence_p(10, 0.0, 1.0), 6), round(equivalence_p(10, 0.1, 0.5), 6)
    (0.001953, 1.0)
    """
    from scipy.stats import binom

    k = torch.arange(n + 1).double()
    far = (k / n - 0.5).abs() >= abs(observed - 0.5) - 1e-12
    return float(torch.as_tensor(binom.pmf(k.numpy(), n, 0.5 + epsilon))[far].sum())


def independence(subject: Model, task: Asked, circuit: Circuit, *, permutations: int = PERMUTATIONS,
                 ablation: str | None = None, batch_size: int | None = None, seed: int = 0) -> Verdict:
    """Whether what the circuit leaves out still tells the model's answers: HSIC between the metric of the model and of
    the complement of the circuit, over the inputs (Shi et al. 2024, section 3.1).

    Raises: ValueError for a circuit of everything, and for fewer than four inputs.
    """
    items, ablation = common([circuit], ablation)
    prepared = posed(subject, task, seed=seed)
    if prepared.rows < 4:
        raise ValueError(f"independence over {prepared.rows} inputs says nothing; give at least 4")
    if len(circuit) == len(items):
        raise ValueError("the circuit is everything, so that nothing is left whose independence could be tested; "
                         "narrow it with top(n) or threshold(x)")
    found, full, _ = run(prepared, [circuit.complement.kept], items, ablation, batch_size)
    value, chance = hsic_test(full, found[0], permutations=permutations, seed=seed)
    return Verdict("independence", "what is left out is independent of the model's answers", value, chance, True)


def hsic(x: Tensor, y: Tensor, *, sigma: float | None = None) -> float:
    """Hilbert-Schmidt independence criterion, trace(H K H L) / (n - 1)^2 with H = 1 - 1/n, K_ij = exp(-(x_i - x_j)^2 /
    (2 sigma^2)) and L of y (Gretton et al. 2007); zero where the two are independent, of as many numbers as there may
    be.

    Args: x, y: (n,). sigma: of both kernels; None: the lower median of all |x_i - y_j|, as Shi et al. 2024 take it.
    Raises: Undefined where that is zero.
    """
    x, y = x.double(), y.double()
    return float(_hsic(*_kernels(x, y, sigma)))


def hsic_test(x: Tensor, y: Tensor, *, permutations: int = PERMUTATIONS, seed: int = 0) -> tuple[float, float]:
    """`hsic`, and its p-value by permuting y: (1 + how many are as large) / (permutations + 1)."""
    K, L = _kernels(x.double(), y.double(), None)
    generator = torch.Generator().manual_seed(seed)
    value = _hsic(K, L)
    orders = (torch.randperm(len(x), generator=generator) for _ in range(permutations))
    random = torch.stack([_hsic(K, L[order][:, order]) for order in orders])
    return float(value), p_value(float(value), random)


def sufficiency(subject: Model, task: Asked, circuit: Circuit, *, count: int = RANDOMS, size: int | None = None,
                quantile: float = QUANTILE, paths: bool = False, ablation: str | None = None,
                batch_size: int | None = None, seed: int = 0) -> Verdict:
    """Whether the circuit is more faithful than a share `quantile` of random circuits (Shi et al. 2024, section 3.2).

    The statistic is the share that it beats; the hypothesis that this is at most the quantile, by a binomial test.
    Args and errors as of `against_random`.
    """
    found = against_random(subject, task, circuit, count=count, size=size, paths=paths, ablation=ablation,
                           batch_size=batch_size, seed=seed)
    return Verdict("sufficiency", f"at most {quantile:g} of random circuits of {found.size} items are less faithful",
                   found.beaten, binomial_p(round(found.beaten * count), count, quantile, "greater"), False, found.low,
                   found.high)


def partial_necessity(subject: Model, task: Asked, circuit: Circuit, *, count: int = RANDOMS, size: int | None = None,
                      quantile: float = QUANTILE, paths: bool = False, ablation: str | None = None,
                      batch_size: int | None = None, seed: int = 0) -> Verdict:
    """Whether knocking out the circuit hurts more than knocking out a share `quantile` of random ones (Shi et al. 2024,
    section 3.2). Args and errors as of `against_random`.
    """
    turned = circuit.complement
    size = len(circuit) if size is None else size
    _differs(circuit, size)
    items, ablation = common([circuit], ablation)
    others = random_circuits(circuit, count, size=size, paths=paths, seed=seed)
    kept = [turned.kept, *(frozenset(items) - one for one in others)]
    found, full, empty = run(posed(subject, task, seed=seed), kept, items, ablation, batch_size)
    left = found - empty if float((full - empty).mean()) > 0 else empty - found  # what a knock-out leaves of the task
    hurt = int((left[1:].mean(1) > left[0].mean()).sum())
    low = high = None
    if len(full) > 1:
        again = left @ redrawn(len(full), RESAMPLES, seed=seed).T
        low, high = torch.quantile((again[1:] > again[:1]).double().mean(0), ENDS).tolist()
    return Verdict("partial necessity", f"knocking out at most {quantile:g} of random circuits of {size} items hurts "
                   "less", hurt / count, binomial_p(hurt, count, quantile, "greater"), False, low, high)


def binomial_p(k: int, n: int, q: float, alternative: str) -> float:
    """One-sided binomial test of k of n against the quantile q: "less" or "greater".

    >>> round(binomial_p(5, 5, 0.5, "greater"), 5), round(binomial_p(5, 5, 0.5, "less"), 5)
    (0.03125, 1.0)
    """
    from scipy.stats import binom

    return float(binom.cdf(k, n, q)) if alternative == "less" else float(binom.sf(k - 1, n, q))


@dataclass(frozen=True, eq=False)
class Needed:
    """Of each item of a circuit: `change`, |F(C) - F(C - v)| of the means, (N,), with its 95 % interval over the
    inputs; `beaten`, the share of random additions whose removal changes less; `p` of "it is no less than the
    quantile", and the same corrected for their number by Holm's method (which the published code leaves open).
    """

    items: tuple[Item, ...]
    change: Tensor
    low: Tensor | None
    high: Tensor | None
    beaten: Tensor
    p: Tensor
    p_holm: Tensor

    def needless(self, level: float = 0.05) -> list[Item]:
        """The items for which the hypothesis that they matter is rejected."""
        return [item for item, p in zip(self.items, self.p_holm.tolist()) if p < level]

    def frame(self) -> DataFrame:
        """One row an item."""
        from pandas import DataFrame

        columns = {name: value for name, value in vars(self).items() if name != "items"}
        return DataFrame({name: None if value is None else value.tolist() for name, value in columns.items()},
                         index=list(map(said, self.items))).rename_axis("item")


def minimality(subject: Model, task: Asked, circuit: Circuit, *, count: int = RANDOMS, quantile: float = QUANTILE,
               ablation: str | None = None, batch_size: int | None = None, seed: int = 0) -> Needed:
    """Whether removing each item changes the metric more than removing a random addition (Shi et al. 2024, section
    3.1).

    An addition is a node, or a random way from the input to the logits, that is put into the circuit, of which one edge
    that came with it is removed again; there are `count` of them, or as many as there are nodes left out.

    Raises: ValueError for an empty circuit, or one of everything, to which nothing can be added.
    """
    items, ablation = common([circuit], ablation)
    _kept(circuit)
    more = inflated(circuit, count, seed=seed)
    own = tuple(circuit)
    kept = [circuit.kept, *(circuit.kept - {item} for item in own), *(one for one, _ in more),
            *(one - {added} for one, added in more)]
    found, _, _ = run(posed(subject, task, seed=seed), kept, items, ablation, batch_size)
    whole, without, inflation, deflated = found.split([1, len(own), len(more), len(more)])
    change, random = whole - without, (inflation - deflated).mean(1).abs()
    mean = change.mean(1).abs()
    beaten = (random[None] < mean[:, None]).sum(1)
    p = [binomial_p(k, len(more), quantile, "less") for k in beaten.tolist()]
    low = high = None
    if found.shape[1] > 1:
        again = (change @ redrawn(found.shape[1], RESAMPLES, seed=seed).T).abs()
        low, high = torch.quantile(again, ENDS, dim=1)
    return Needed(own, mean, low, high, beaten.double() / len(more), torch.tensor(p, dtype=torch.float64),
                  torch.tensor(holm(p), dtype=torch.float64))


def verdicts(subject: Model, task: Asked, circuit: Circuit, *, count: int = RANDOMS, ablation: str | None = None,
             batch_size: int | None = None, seed: int = 0) -> DataFrame:
    """All the tests of a circuit as a table, one row each: statistic, interval, p-value, and whether it speaks for the
    circuit. That of `minimality` is the share of items that are needed.

    Raises: as the tests themselves, for an empty or a full circuit, or fewer than four inputs.
    """
    from pandas import DataFrame

    prepared = posed(subject, task, seed=seed)
    given = {"ablation": ablation, "batch_size": batch_size, "seed": seed}
    found = [equivalence(subject, prepared, circuit, **given), independence(subject, prepared, circuit, **given),
             sufficiency(subject, prepared, circuit, count=count, **given),
             partial_necessity(subject, prepared, circuit, count=count, **given)]
    needed = minimality(subject, prepared, circuit, count=count, **given)
    lines = [{"test": one.test, "hypothesis": one.hypothesis, "statistic": one.statistic, "low": one.low,
              "high": one.high, "p": one.p, "passed": one.passed()} for one in found]
    lines.append({"test": "minimality", "hypothesis": "every item changes the metric as much as additions do",
                  "statistic": 1 - len(needed.needless()) / len(circuit), "low": None, "high": None,
                  "p": float(needed.p_holm.min()), "passed": not needed.needless()})
    return DataFrame(lines).set_index("test").astype({"low": float, "high": float})


# -- details -----------------------------------------------------------------------------------------------------------


def _kernels(x: Tensor, y: Tensor, sigma: float | None) -> tuple[Tensor, Tensor]:
    if sigma is None:
        sigma = float((x[:, None] - y[None]).abs().flatten().median())
    if not sigma > 0:
        raise Undefined("at least half of the values are equal, so that the width of the kernel is zero; give sigma=, "
                        "or more inputs")
    kernel = lambda one: torch.exp(-(one[:, None] - one[None]).square() / (2 * sigma**2))
    return kernel(x), kernel(y)


def _hsic(K: Tensor, L: Tensor) -> Tensor:
    centred = K - K.mean(0) - K.mean(1, keepdim=True) + K.mean()  # H K H
    return (centred * L.T).sum() / (len(K) - 1) ** 2


def _interval(values: Tensor, seed: int) -> tuple[float | None, float | None]:
    if len(values) < 2:
        return None, None
    again = redrawn(len(values), RESAMPLES, seed=seed) @ values
    return tuple(torch.quantile(again, ENDS).tolist())


def _kept(circuit: Circuit) -> None:
    if not len(circuit):
        raise ValueError(f"the circuit is empty: it keeps none of {len(circuit.scores)} {circuit.noun}; narrow it with "
                         "top(n) or threshold(x)")


def _differs(circuit: Circuit, size: int) -> None:
    _kept(circuit)
    if len(circuit) == len(circuit.scores):
        raise ValueError(f"the circuit is all of {len(circuit)} {circuit.noun}, from which no random one of its size "
                         "differs; narrow it with top(n) or threshold(x)")
    if not 1 <= size <= len(circuit.scores):
        raise ValueError(f"random circuits of {size} of {len(circuit.scores)} {circuit.noun}; give 1 to "
                         f"{len(circuit.scores)}")


__all__ = ["Chance", "Needed", "Verdict", "against_random", "binomial_p", "equivalence", "equivalence_p", "hsic",
           "hsic_test", "independence", "minimality", "partial_necessity", "random_curve", "sufficiency",
           "verdicts"]
