"""Perturbation: what becomes of the target while units are taken out of the input in the order of a map.

A `Course` runs the model on the inputs it is asked for and remembers them, so that measures which look at the same
inputs share their cost. Curves are read in tenths of the units; where what counts is less than a tenth of them, all
tenths but the first lie behind what happens, and a course may read each of the first and last units too (`ends`). Each
measure reads courses: `most` removes the most relevant unit first, `least` the least
relevant first. Inputs with units taken out are unlike what a model was trained on, so that every number depends on what
stands in their place: compare maps under one baseline only.

References: H. Chefer, S. Gur and L. Wolf, "Transformer Interpretability Beyond Attention Visualization", CVPR 2021;
R. Achtibat et al., "AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers", ICML 2024; V. Petsiuk,
A. Das and K. Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC 2018; J. DeYoung et
al., "ERASER: A Benchmark to Evaluate Rationalized NLP Models", ACL 2020; Y. Rong et al., "A Consistent and Efficient
Evaluation Strategy for Attribution Methods", ICML 2022.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import rows, units
from ..still import settled
from ..subject import Subject
from ..target import Choice, Probability, Reading, Target, Targets, Token
from ..tokens import Batch
from . import statistics
from .removal import Removal, chance, whole

TENTHS = tuple(step / 10 for step in range(11))
INNER = TENTHS[1:-1]  # 0.1 to 0.9
BINS = (0.01, 0.05, 0.1, 0.2, 0.5)  # of ERASER
VALUE, PROBABILITY, KEPT = range(3)  # what is read of an input


@dataclass(frozen=True)
class Decision(Target):
    """1 where the model decides for a class, tag or token, else 0: the largest logit, or a positive one where each
    class is decided for itself.
    """

    of: Choice

    def value(self, reading: Reading) -> Tensor:
        z, column = self.of.choices(reading), self.of.column(reading)
        own = z.gather(1, column[:, None])[:, 0]
        each = not isinstance(self.of, Token) and (reading.vocabulary.multilabel or z.shape[1] == 1)
        return (own > 0 if each else z.argmax(1) == column).to(z.dtype)


@dataclass(frozen=True)
class Readout:
    """What is read of the model's output for each row: the target's value, its probability, and whether the model
    still decides for it; the last two are NaN unless every target is a class or a token."""

    subject: Subject
    batch: Batch
    targets: Targets  # fixed
    batch_size: int = 32

    @classmethod
    def of(cls, subject: Subject, batch: Batch, targets: Targets, *, batch_size: int = 32) -> tuple[Readout, Tensor]:
        """The readout of a batch, a prediction written down as the class it is, and what it reads there, (B, 3)."""
        with settled(subject.model), torch.no_grad():
            fixed, _ = whole(subject, batch, targets, batch_size)
            readout = cls(subject, batch, fixed, batch_size)
            parts = [readout.read(batch.take(which), which) for which in torch.arange(batch.rows).split(batch_size)]
        return readout, torch.cat(parts)

    @property
    def decides(self) -> bool:
        """Whether the targets are classes, tags or tokens, which alone have a probability and can be decided for."""
        return all(isinstance(target, Choice) for target in self.targets.targets)

    def read(self, changed: Batch, which: Tensor) -> Tensor:
        """Value, probability and decision of the rows `which` (R,) in their changed form, (R, 3), float64, CPU."""
        output, own = self.subject.forward(changed), self.targets.take(which.tolist())
        found = [own.value(output, changed)]
        for kind in (Probability, Decision) if self.decides else ():
            found.append(replace(own, targets=tuple(map(kind, own.targets))).value(output, changed))
        found += [torch.full_like(found[0], torch.nan)] * (3 - len(found))
        return torch.stack([one.double().cpu() for one in found], 1)


class Course:
    """The target while units go in one order; inputs that were run are remembered. `forwards` counts them."""

    def __init__(self, readout: Readout, removal: Removal, ranks: Tensor, start: Tensor, *, ends: int = 0) -> None:
        """Args: ranks: when each unit goes, (B, U), larger than any count for what is no unit. start: of the whole
        input, (B, 3). ends: how many of the first and last units curves are read at, besides tenths."""
        self.readout, self.removal, self.ranks, self.ends = readout, removal, ranks, ends
        self.forwards = 0
        self._known = {(row, 0): values for row, values in enumerate(start)}

    def at(self, counts: Tensor) -> Tensor:
        """What is read when so many units are gone: (B, F) counts to (B, F, 3).

        Raises: ValueError where the target turns NaN or infinite.
        """
        wanted = {(row, count) for row, line in enumerate(counts.tolist()) for count in line} - self._known.keys()
        plan = torch.tensor(sorted(wanted), dtype=torch.long).view(-1, 2)
        with settled(self.readout.subject.model), torch.no_grad():
            for chunk in plan.split(self.readout.batch_size):
                if len(chunk):
                    self._run(chunk)
        return torch.stack([torch.stack([self._known[row, count] for count in line])
                            for row, line in enumerate(counts.tolist())])

    def removing(self, fractions: Sequence[float]) -> Tensor:
        """What is read when these fractions of each row's units are gone, rounded to whole units: (B, F, 3)."""
        return self.at((torch.tensor(fractions, dtype=torch.float64) * self.removal.counts[:, None]).round().long())

    def along(self, *, inner: bool = False) -> tuple[Tensor, Tensor]:
        """The curve: fractions that are gone, (F,), or (B, F) with `ends`, and what is read there, (B, F, 3).

        Args: inner: from the first step, a tenth or a unit, to the last but one.
        """
        if not self.ends:
            tenths = INNER if inner else TENTHS
            return torch.tensor(tenths, dtype=torch.float64), self.removing(tenths)
        total, own = self.removal.counts[:, None], torch.arange(self.ends + 1)
        tenths = (torch.tensor(TENTHS, dtype=torch.float64) * total).round().long()
        counts = torch.cat([own.minimum(total), tenths, (total - own).clamp(min=0)], 1).sort(1).values
        if inner:
            counts = counts.clamp(min=1).minimum((total - 1).clamp(min=1))
        return counts / total.double(), self.at(counts)

    def _run(self, chunk: Tensor) -> None:
        row, count = chunk.T
        device = rows.leaf(self.readout.batch)[1].device
        gone = self.ranks[row] < count[:, None]  # (R, U)
        found = self.readout.read(self.removal.without(row.to(device), gone.to(device)), row)
        if not found[:, VALUE].isfinite().all():
            raise ValueError(f"the target turns {found[~found[:, VALUE].isfinite(), VALUE][0].item()} under the "
                             f"baseline {self.removal.baseline!r}; choose another one")
        self.forwards += len(chunk)
        self._known |= {tuple(place): values for place, values in zip(chunk.tolist(), found, strict=True)}


def courses(readout: Readout, removal: Removal, relevance: Tensor, start: Tensor, *, seed: int = 0,
            ends: int = 0) -> tuple[Course, Course]:
    """The courses of a map: most relevant first, and least relevant first.

    Args: relevance: (B, T) or (B, Y, X). start: what `readout` reads of the whole input, (B, 3). seed: of the order of
        ties, which is that of `ablation`. ends: of `Course`.
    Raises: ValueError for a map that does not fit; Undefined for one that says nothing.
    """
    if relevance.shape != removal.groups.shape:
        raise ValueError(f"a map of shape {tuple(relevance.shape)} does not fit an input of "
                         f"{tuple(removal.groups.shape)}")
    pooled = units.pooled(relevance.detach().cpu().double(), removal.groups)  # (B, U)
    most = torch.full(pooled.shape, pooled.shape[1] + 1)
    least = most.clone()
    for row, count in enumerate(removal.counts.tolist()):
        generator = chance(readout.batch, removal.groups, row, seed)
        ranks = statistics.order(pooled[row, :count], generator).argsort()
        most[row, :count], least[row, :count] = ranks, count - 1 - ranks
    return tuple(Course(readout, removal, ranks, start, ends=ends) for ranks in (most, least))


def area(most: Course, least: Course) -> Tensor:
    """Area between the target's value by least and by most relevant first. Higher is better, chance is 0.

    int_0^1 (LeRF(f) - MoRF(f)) df over the removed fraction f in tenths, trapezoid rule (Achtibat et al. 2024, section
    4.1; see `statistics.area`). Unit: that of the target. Returns: (B,).
    """
    (fractions, first), (_, last) = (course.along() for course in (most, least))
    return statistics.area(fractions, first[..., VALUE], last[..., VALUE])


def positive_auc(most: Course) -> Tensor:
    """Share of the steps at which the model still decides for the target, most relevant first. Lower is better.

    int_{0.1}^{0.9} 1[argmax z(f) = c] df / 0.8 in tenths, trapezoid rule: Chefer et al. 2021 (section 4, positive
    perturbation) take the area under the accuracy of the data set, which is the mean of this one over the rows, not
    divided by the width. With `ends` it is from the first unit to the last but one. A multi-label class counts while
    its logit is positive. Returns: (B,).
    """
    return _mean_height(_decided(most), KEPT, inner=True)


def negative_auc(least: Course) -> Tensor:
    """The same as `positive_auc`, least relevant first (negative perturbation). Higher is better."""
    return positive_auc(least)


def deletion(most: Course) -> Tensor:
    """Area under the probability of the target, most relevant first. Lower is better.

    int_0^1 p(f) df in tenths, trapezoid rule (Petsiuk et al. 2018, section 3.3). Returns: (B,), from 0 to 1.
    """
    return _mean_height(_decided(most), PROBABILITY)


def insertion(least: Course) -> Tensor:
    """Area under the probability of the target, while the most relevant units are put into an input of which nothing
    is left. Higher is better.

    int_0^1 p(f) df over the fraction put back (Petsiuk et al. 2018, section 3.3), which is `least` read backwards. They
    start from a blurred picture: give a course of that removal. Returns: (B,), from 0 to 1.
    """
    return _mean_height(_decided(least), PROBABILITY)


def comprehensiveness(most: Course) -> Tensor:
    """Probability that is lost with the most relevant units. Higher is better, what is irrelevant gets about 0.

    mean_k [p(x) - p(x without the top k)], k = 1, 5, 10, 20, 50 % of the units, at least one (DeYoung et al. 2020,
    eq. 1 and the bins of section 4.2). They drop words; here the baseline of the removal stands in their place.
    Returns: (B,).
    """
    taken = _taken(most)
    gone = _decided(most).at(torch.cat([torch.zeros_like(taken[:, :1]), taken], 1))[..., PROBABILITY]
    return gone[:, 0] - gone[:, 1:].mean(1)


def sufficiency(least: Course) -> Tensor:
    """Probability that is lost when the most relevant units alone are left. Lower is better.

    mean_k [p(x) - p(the top k alone)], the k of `comprehensiveness` (DeYoung et al. 2020, eq. 2). Returns: (B,).
    """
    rest = least.removal.counts[:, None] - _taken(least)
    kept = _decided(least).at(torch.cat([torch.zeros_like(rest[:, :1]), rest], 1))[..., PROBABILITY]
    return kept[:, 0] - kept[:, 1:].mean(1)


def road(most: Course, least: Course) -> Tensor:
    """How much more often the model still decides for the target by least than by most relevant first, removed pixels
    being imputed. Higher is better, chance is 0.

    mean over f = 0.1 ... 0.9 of 1[kept by LeRF] - 1[kept by MoRF] (Rong et al. 2022, section 5: remove and debias,
    without retraining, both orders in one number). Give courses of `imputation.imputed`. Returns: (B,), from -1 to 1.
    """
    first, last = (_decided(course).removing(INNER)[..., KEPT] for course in (most, least))
    return (last - first).mean(1)


def _decided(course: Course) -> Course:
    if not course.readout.decides:
        names = {type(target).__name__ for target in course.readout.targets.targets}
        raise ValueError("this measure reads the probability of, or the decision for, a class or a token, and the "
                         f"target is a {', '.join(sorted(names))}; explain a class or token")
    return course


def _taken(course: Course) -> Tensor:
    return (torch.tensor(BINS, dtype=torch.float64) * course.removal.counts[:, None]).ceil().long()


def _mean_height(course: Course, what: int, *, inner: bool = False) -> Tensor:
    """Area under the course's curve over its width, (B,)."""
    fractions, read = course.along(inner=inner)
    return torch.trapezoid(read[..., what], fractions) / (fractions[..., -1] - fractions[..., 0])
