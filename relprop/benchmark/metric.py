"""Every metric of the benchmark by name: what it asks for, which way is better, and where it comes from."""
from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..check import infidelity, localisation, perturbation, rationale, sanity, sensitivity, sentiment
from ..check.removal import chance
from ..data import Data
from ..errors import Undefined
from ..subject import Subject
from .case import Case

HIGHER, LOWER, ZERO = "higher", "lower", "zero"
Reading = float | Undefined

NEEDS: dict[str, Callable[[Subject, Data], str | None]] = {
    "marked": lambda subject, data: None if data.has("marked") else f"data {data.name!r} marks nothing",
    "labels": lambda subject, data: None if data.has("labels") else f"data {data.name!r} has no labels of words",
    "others": lambda subject, data: None if data.has("others") else f"data {data.name!r} has no masks of other classes",
    "image": lambda subject, data: None if data.modality == "image" else f"data {data.name!r} is {data.modality}, and "
                                                                         "it measures pictures",
    "words": lambda subject, data: None if data.modality != "image" else f"data {data.name!r} is pictures, and it "
                                                                         "measures text",
}
"""What a metric may need: why these data do not have it, or None."""


@dataclass(frozen=True)
class Metric:
    """A metric: `read` gives a number or the reason why there is none for each row of a case.

    `best` is "higher", "lower" or "zero" (nearest to it). `needs` are of `NEEDS`. `costly` ones explain every input
    many times over and are run only when they are asked for.
    """

    name: str
    best: str
    read: Callable[[Case], Sequence[Reading]]
    about: str
    reference: str
    needs: tuple[str, ...] = ()
    costly: bool = False

    def lacks(self, subject: Subject, data: Data) -> str | None:
        """Why it does not apply to these data, or None if it does."""
        return next((why for need in self.needs if (why := NEEDS[need](subject, data)) is not None), None)

    def to_dict(self) -> dict[str, str]:
        """What a report says of it."""
        return {"name": self.name, "best": self.best, "about": self.about, "reference": self.reference}


def named(names: Sequence[str | Metric] | None, subject: Subject, data: Data) -> list[Metric]:
    """The metrics asked for, by name or as they are; None: all that apply and are not costly.

    Raises: ValueError for an unknown name, with those known, for one that does not apply, with the reason, and where
        none is left.
    """
    if names is None:
        found = [metric for metric in METRICS.values() if not metric.costly and metric.lacks(subject, data) is None]
    else:
        asked = dict.fromkeys([names] if isinstance(names, str | Metric) else names)
        found = [one if isinstance(one, Metric) else _known(one) for one in asked]
    for metric in found:
        if why := metric.lacks(subject, data):
            raise ValueError(f"metric {metric.name!r} does not apply: {why}")
    if not found:
        raise ValueError(f"no metric to measure with; there are {', '.join(METRICS)}")
    return found


def _known(name: str) -> Metric:
    if name not in METRICS:
        close = difflib.get_close_matches(str(name), METRICS, n=1)
        raise ValueError(f"unknown metric {name!r}; the metrics are {', '.join(METRICS)}"
                         f"{f'; did you mean {close[0]!r}?' if close else ''}")
    return METRICS[name]


def each(measure: Callable[[Case, int], float]) -> Callable[[Case], list[Reading]]:
    """A measure of one row, for all rows; what it refuses is the row's reading."""
    def read(case: Case) -> list[Reading]:
        found: list[Reading] = []
        for row in range(len(case.relevance)):
            try:
                found.append(measure(case, row))
            except Undefined as why:
                found.append(why)
        return found

    return read


def _of(measure: Callable[..., float], what: str) -> Callable[[Case], list[Reading]]:
    """A measure of the relevance of what can be marked and of the truth: `marked` or `labels`."""
    def read(case: Case, row: int) -> float:
        truth = getattr(case.rows.truths[row], what)
        if truth is None:
            raise Undefined(f"this row has no {what}")
        return measure(case.placed[row], truth)

    return each(read)


def _class_mass(case: Case, row: int) -> float:
    """Against all other classes of the picture together."""
    truth = case.rows.truths[row]
    if truth.marked is None or not truth.others:
        raise Undefined("this row has no mask of another class")
    return localisation.class_mass(case.placed[row], truth.marked,
                                   torch.stack(list(truth.others.values())).any(0) & ~truth.marked)


def _token_f1(case: Case, row: int) -> float:
    return rationale.token_f1(case.placed[row], _marked(case, row), share=case.options.share)


def _iou_f1(case: Case, row: int) -> float:
    generator = chance(case.rows.batch, case.removal.groups, row, case.options.seed)
    return rationale.iou_f1(case.placed[row], _marked(case, row), share=case.options.share, generator=generator)


def _marked(case: Case, row: int) -> Tensor:
    marked = case.rows.truths[row].marked
    if marked is None:
        raise Undefined("this row has no marked words")
    return marked


def _numbers(read: Callable[[Case], Tensor], why: str = "it is not finite") -> Callable[[Case], list[Reading]]:
    """A measure that gives all rows at once, (B,); NaN has this reason."""
    return lambda case: [value if math.isfinite(value) else Undefined(why) for value in read(case).tolist()]


def _infidelity(case: Case) -> Tensor:
    return infidelity.infidelity(case.rows.readout, case.removal, case.relevance, seed=case.options.seed)


def _max_sensitivity(case: Case) -> Tensor:
    rows, options = case.rows, case.options
    return sensitivity.max_sensitivity(rows.subject, rows.batch, rows.targets, case.run, seed=options.seed,
                                       batch_size=options.batch_size)


def _class_contrast(case: Case) -> list[Reading]:
    try:
        other = case.other
    except Undefined as why:
        return [why] * len(case.relevance)
    found = sanity.class_contrast(case.relevance.cpu(), other.cpu(), case.rows.batch).tolist()
    return [value if math.isfinite(value) else Undefined("the map of the other class says nothing") for value in found]


FLAT = "the map of a randomised model says nothing"
CHEFER, PETSIUK, ERASER = "Chefer et al. 2021", "Petsiuk et al. 2018", "DeYoung et al. 2020"
ARRAS, ADEBAYO, YEH = "Arras et al. 2022", "Adebayo et al. 2018", "Yeh et al. 2019"
_MASK, _REASON = ("marked", "image"), ("marked", "words")

METRICS: dict[str, Metric] = {metric.name: metric for metric in [
    Metric("area", HIGHER, _numbers(lambda case: perturbation.area(*case.courses)),
           "area between the target by least and by most relevant first, unit of the target", "Achtibat et al. 2024"),
    Metric("positive-auc", LOWER, _numbers(lambda case: perturbation.positive_auc(case.courses[0])),
           "how long the model's decision stands, most relevant first", CHEFER),
    Metric("negative-auc", HIGHER, _numbers(lambda case: perturbation.negative_auc(case.courses[1])),
           "how long the model's decision stands, least relevant first", CHEFER),
    Metric("deletion", LOWER, _numbers(lambda case: perturbation.deletion(case.courses[0])),
           "probability of the target, most relevant first", PETSIUK),
    Metric("insertion", HIGHER, _numbers(lambda case: perturbation.insertion(case.inserted)),
           "probability of the target while the most relevant comes back, into a blur", PETSIUK),
    Metric("comprehensiveness", HIGHER, _numbers(lambda case: perturbation.comprehensiveness(case.courses[0])),
           "probability that is lost with the most relevant", ERASER),
    Metric("sufficiency", LOWER, _numbers(lambda case: perturbation.sufficiency(case.courses[1])),
           "probability that is lost without all but the most relevant", ERASER),
    Metric("road", HIGHER, _numbers(lambda case: perturbation.road(*case.imputed)),
           "how much more often the decision stands by least than by most relevant first, pixels imputed",
           "Rong et al. 2022", ("image",)),
    Metric("infidelity", LOWER, _numbers(_infidelity),
           "squared error of the map as a linear model of what removing units does, at its best scale", YEH),
    Metric("max-sensitivity", LOWER, _numbers(_max_sensitivity),
           "largest relative change of the map when the input hardly changes", YEH, costly=True),
    Metric("pixel-accuracy", HIGHER, _of(localisation.pixel_accuracy, "marked"),
           "pixels told right when the map is cut at its mean", CHEFER, _MASK),
    Metric("mean-average-precision", HIGHER, _of(localisation.mean_average_precision, "marked"),
           "average precision, mean of foreground and ground", CHEFER, _MASK),
    Metric("mean-iou", HIGHER, _of(localisation.mean_iou, "marked"),
           "intersection over union when the map is cut at its mean, of foreground and ground", CHEFER, _MASK),
    Metric("pointing-game", HIGHER, _of(localisation.pointing_game, "marked"),
           "whether the largest relevance is on what is marked", "Zhang et al. 2016", ("marked",)),
    Metric("relevance-mass", HIGHER, _of(localisation.relevance_mass, "marked"),
           "share of the positive relevance on what is marked", ARRAS, ("marked",)),
    Metric("relevance-rank", HIGHER, _of(localisation.relevance_rank, "marked"),
           "share of the K largest on what is marked, K its size", ARRAS, ("marked",)),
    Metric("class-mass", HIGHER, each(_class_mass),
           "share on the class asked for, of the positive relevance on any class's mask", CHEFER, ("others",)),
    Metric("token-f1", HIGHER, each(_token_f1),
           "F1 of the most relevant words against the rationale", ERASER, _REASON),
    Metric("iou-f1", HIGHER, each(_iou_f1),
           "F1 of the spans of the most relevant words against those of the rationale", ERASER, _REASON),
    Metric("auprc", HIGHER, _of(rationale.auprc, "marked"),
           "area under precision over recall of the rationale's words", ERASER, _REASON),
    Metric("rank-correlation", HIGHER, _of(sentiment.rank_correlation, "labels"),
           "Spearman's correlation of words' relevance and labels", "Atanasova et al. 2020", ("labels",)),
    Metric("sign-agreement", HIGHER, _of(sentiment.sign_agreement, "labels"),
           "share of labelled words with the sign of their label", "Atanasova et al. 2020", ("labels",)),
    Metric("cascading-randomisation", ZERO, _numbers(lambda case: case.cascade.nanmean(0), FLAT),
           "rank correlation with the maps of models randomised from the output down, mean of the stages", ADEBAYO,
           costly=True),
    Metric("full-randomisation", ZERO, _numbers(lambda case: case.cascade[-1], FLAT),
           "rank correlation with the map of a model that has learned nothing", ADEBAYO, costly=True),
    Metric("independent-randomisation", ZERO, _numbers(lambda case: case.alone.nanmean(0), FLAT),
           "rank correlation with the maps of models with one layer randomised, mean of the layers", ADEBAYO,
           costly=True),
    Metric("class-contrast", LOWER, _class_contrast,
           "rank correlation with the map of the class that comes next", "Sixt et al. 2020", costly=True),
]}
"""Every metric by name."""
