"""Numbers that papers published, each with where it was read, and the metrics that compute ours by the same convention.

What stands here as theirs was found written: in the paper, in a paper that restates it, or in the words of its authors;
where only some cells of a table were found, only these are cited, and where none were, none are.
"""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from .. import view
from ..check import convention, perturbation
from ..errors import Undefined
from ..result import Table
from .case import Case
from .metric import HIGHER, LOWER, Metric, Reading, each

if TYPE_CHECKING:
    from pandas import DataFrame

CHEFER = "Chefer et al. 2021"
ACHTIBAT = "Achtibat et al. 2024"
KS = tuple(range(10, 90, 10))  # words of a rationale


@dataclass(frozen=True)
class Published:
    """A table of a paper: `numbers` are theirs, by column and by our name of the method.

    `source` says where they were read, `apart` what is done otherwise here.
    """

    title: str
    reference: str
    source: str
    apart: str
    numbers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def beside(self, measured: Mapping[str, Mapping[str, float | None]]) -> DataFrame:
        """Ours and theirs beside each other, by method and (column, "here" or "paper"); NaN where there is no number,
        and no "paper" where the paper has none at all.

        Args: measured: by column and method.
        """
        from pandas import DataFrame, MultiIndex

        both = [*measured.values(), *self.numbers.values()]
        methods = list(dict.fromkeys(name for column in both for name in column))
        columns = [(column, who) for column in measured for who in ("here", "paper")
                   if who == "here" or column in self.numbers]
        of = {"here": measured, "paper": self.numbers}
        lines = [[_number(of[who].get(column, {}).get(name)) for column, who in columns] for name in methods]
        return DataFrame(lines, index=methods, columns=MultiIndex.from_tuples(columns)).rename_axis("method")

    def save(self, measured: Mapping[str, Mapping[str, float | None]], folder: str | PathLike, *, of: Table
             ) -> DataFrame:
        """Writes `beside` into a folder, as paper.csv, paper.json and paper.html. Returns it.

        Args: of: a table whose model and data were measured, which the files name.
        """
        frame, folder = self.beside(measured), Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        flat = frame.copy()
        flat.columns = [f"{column} ({who})" for column, who in frame.columns]
        flat.to_csv(folder / "paper.csv")
        said = {"title": self.title, "here": here(of), "reference": self.reference, "source": self.source,
                "apart": self.apart}
        tree = {**said, "measured": measured, "paper": self.numbers}
        (folder / "paper.json").write_text(json.dumps(tree, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        page = view.beside(frame, **said, table=_link(folder))
        (folder / "paper.html").write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
        return frame


def here(table: Table) -> str:
    """What was measured: the model, the data and the number of inputs."""
    subject, data = table.about["subject"]["name"], table.about["data"]["name"]
    return f"{subject} on {table.about['rows']} inputs of {data}"


def means(table: Table, metric: str, scale: float = 1.0) -> dict[str, float | None]:
    """The mean of a metric, scaled, by method, controls among them; None where it has no value."""
    cells = {cell.method: cell.mean for cell in table.cells if cell.metric == metric}
    return {name: None if mean is None else scale * mean for name, mean in cells.items()}


def segmentation(table: Table) -> dict[str, dict[str, float | None]]:
    """Columns of `SEGMENTATION` from a table of `SEGMENTATION_METRICS`, in percent."""
    found, ground = means(table, "right-foreground"), means(table, "right-ground")
    both = {name: (f, ground[name]) for name, f in found.items()}
    share = lambda read: {name: None if None in parts else 100 * read(*parts) for name, parts in both.items()}
    return {"pixel accuracy": share(lambda f, g: f + g), "mAP": means(table, "joint-average-precision", 100),
            "mIoU": share(convention.pooled_iou)}


def _link(folder: Path) -> str | None:
    return "table.html" if (folder / "table.html").is_file() else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _on_pixels(measure: Callable[..., float]) -> Callable[[Case], list[Reading]]:
    """A measure of the map as it is drawn over pixels, and of the mask."""
    def read(case: Case) -> list[Reading]:
        drawn = convention.drawn(case.relevance.detach().cpu(), case.rows.batch)
        return each(lambda case, row: measure(drawn[row], _marked(case, row)))(case)

    return read


def _on_words(measure: Callable[..., float]) -> Callable[[Case], list[Reading]]:
    """A measure of the words' relevance and of the marked words."""
    return each(lambda case, row: measure(case.placed[row], _marked(case, row)))


def _marked(case: Case, row: int):
    if case.rows.truths[row].marked is None:
        raise Undefined("this row has no marks")
    return case.rows.truths[row].marked


def _black(which: int) -> Callable[[Case], list[Reading]]:
    """Area under the accuracy, pixels painted black: most relevant first (0), or least (1)."""
    def read(case: Case) -> list[Reading]:
        rows = case.rows
        drawn = convention.drawn(case.relevance.detach().cpu(), rows.batch)
        out = convention.blackened(rows.subject, rows.batch)
        found = perturbation.courses(rows.readout, out, drawn, rows.start, seed=case.options.seed)[which]
        return convention.accuracy_area(found).tolist()

    return read


def _zeroed_area(case: Case) -> list[Reading]:
    """Area between the curves of the logit, vectors of tokens set to zero."""
    rows = case.rows
    with convention.zeroed(rows.subject, rows.batch) as out:
        both = perturbation.courses(rows.readout, out, case.relevance, rows.start, seed=case.options.seed)
        return perturbation.area(*both).tolist()


SEGMENTATION_METRICS = (
    Metric("right-foreground", HIGHER, _on_pixels(lambda relevance, mask: convention.right_parts(relevance, mask)[0]),
           "share of all pixels that are marked and told so by the map cut at its mean", CHEFER, ("marked", "image")),
    Metric("right-ground", HIGHER, _on_pixels(lambda relevance, mask: convention.right_parts(relevance, mask)[1]),
           "share of all pixels that are ground and told so by the map cut at its mean", CHEFER, ("marked", "image")),
    Metric("joint-average-precision", HIGHER, _on_pixels(convention.joint_average_precision),
           "average precision of foreground and ground in one ranking, by the scaled map", CHEFER, ("marked", "image")),
)
PERTURBATION_METRICS = (
    Metric("positive-accuracy-area", LOWER, _black(0),
           "percent, area under the accuracy from 0 to 0.9 painted black, most relevant first", CHEFER, ("image",)),
    Metric("negative-accuracy-area", HIGHER, _black(1),
           "percent, area under the accuracy from 0 to 0.9 painted black, least relevant first", CHEFER, ("image",)),
)
RATIONALE_METRICS = tuple(
    Metric(f"token-f1@{k}", HIGHER, _on_words(partial(convention.top_f1, count=k)),
           f"F1 of the {k} most relevant words against the rationale", CHEFER, ("marked", "words")) for k in KS)
AREA_METRIC = Metric("zeroed-area", HIGHER, _zeroed_area,
                     "area between the logit by least and by most relevant first, vectors of tokens set to zero",
                     ACHTIBAT, ("words",))
ANSWER_METRIC = Metric("top-iou", HIGHER, _on_words(convention.top_iou),
                       "intersection over union of the answer's words and as many of the most relevant", ACHTIBAT,
                       ("marked", "words"))

SEGMENTATION = Published(
    title="ImageNet-Segmentation, ViT-B/16, percent",
    reference="H. Chefer, S. Gur and L. Wolf, Transformer Interpretability Beyond Attention Visualization, CVPR 2021, "
              "the table of segmentation",
    source="read in A. Helbling et al., ConceptAttention: Diffusion Transformers Learn Highly Interpretable Features, "
           "2025, arXiv:2502.04320, table 1, which restates it and calls the model CLIP ViT",
    apart="As in their code, pictures are resized whole, maps of patches are drawn bilinearly and cut at their mean, "
          "and intersections and unions are pooled over the data. Their LRP is full-lrp here, their GradCAM "
          "attention-gradcam, their ViT attention last-layer-attention. Masks are resized as the pictures are and cut "
          "halfway, theirs by the nearest pixel. Pictures of which the map or the mask is the same everywhere are left "
          "out; theirs count.",
    numbers={"pixel accuracy": {"transformer-attribution": 79.70, "rollout": 73.54, "last-layer-attention": 67.84,
                                "attention-gradcam": 64.44, "full-lrp": 51.09, "partial-lrp": 76.31},
             "mAP": {"transformer-attribution": 86.03, "rollout": 84.76, "last-layer-attention": 80.24,
                     "attention-gradcam": 71.60, "full-lrp": 55.68, "partial-lrp": 84.67},
             "mIoU": {"transformer-attribution": 61.95, "rollout": 55.42, "last-layer-attention": 46.37,
                      "attention-gradcam": 40.82, "full-lrp": 32.89, "partial-lrp": 57.94}})
PERTURBATION = Published(
    title="Perturbation of ImageNet's validation set, ViT-B/16, area under the accuracy, percent",
    reference="H. Chefer, S. Gur and L. Wolf, Transformer Interpretability Beyond Attention Visualization, CVPR 2021, "
              "table 1",
    source="four cells, as quoted from the paper in issues 31 and 52 of github.com/hila-chefer/"
           "Transformer-Explainability; the others were not found and are not cited",
    apart="As in their code, pictures are resized whole, maps of patches are drawn bilinearly, pixels are painted "
          "black, and the area is from 0 to 0.9, not divided by its width, under the accuracy against the label, for "
          "the map of the predicted class, too. A reader of the code measured 55.20 and 16.61 (issue 52) where the "
          "paper has 54.16 and 17.03.",
    numbers={"negative, predicted": {"transformer-attribution": 54.16, "rollout": 53.1, "attention-gradcam": 41.52},
             "positive, predicted": {"transformer-attribution": 17.03}})
ERASER = Published(
    title="ERASER movie reviews, agreement with human rationales and faithfulness",
    reference="J. DeYoung et al., ERASER: A Benchmark to Evaluate Rationalized NLP Models, ACL 2020; H. Chefer, S. Gur "
              "and L. Wolf, Transformer Interpretability Beyond Attention Visualization, CVPR 2021 (token F1 of the k "
              "most relevant words, a figure without a table)",
    source="no number of theirs was found as text, and none is cited",
    apart="F1 is a mean over reviews; words are summed over their pieces, where their code takes the largest piece. "
          "The model reads as many tokens of a review as it can, and words beyond are left out. A word is deleted by "
          "hiding it from attention, so that its place stays empty.")
ATTNLRP = Published(
    title="Area between least and most relevant first",
    reference="R. Achtibat et al., AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers, ICML "
              "2024, table 1",
    source="the cells of the table were not found as text, and none is cited; the procedure is that of issue 40 of "
           "github.com/rachtibat/LRP-eXplains-Transformers",
    apart="The area is per unit of the removed fraction, in tenths, and in the unit of the logit. Of texts, vectors of "
          "tokens are set to zero; of pictures, patches become their median colour. Left out: the paper's own prompts "
          "and fine-tuned heads, which were not published, and so LLaMA 2 as a classifier of IMDB (any classifier of "
          "texts stands in its place); Flan-T5 and Mixtral at the size of the paper.")
