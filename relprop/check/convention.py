"""Measures as the code that came with a paper computes them, where this package's own differ.

They serve to set numbers beside the published ones; to compare methods, take the others, which say in their docstrings
what these leave open (scaling of the map, pooling of pictures, the width of a curve).

References: H. Chefer, S. Gur and L. Wolf, "Transformer Interpretability Beyond Attention Visualization", CVPR 2021, and
its code, github.com/hila-chefer/Transformer-Explainability (`imagenet_seg_eval.py`, `pertubation_eval_from_hdf5.py`,
issue 31 on the area, `bert_pipeline.py`); R. Achtibat et al., "AttnLRP: Attention-Aware Layer-Wise Relevance
Propagation for Transformers", ICML 2024, and github.com/rachtibat/LRP-eXplains-Transformers, issue 40.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import rows, units
from ..errors import Undefined
from ..subject import Subject
from ..tokens import Batch, ImageUnits
from . import statistics
from .embedding import extended, looked_up
from .localisation import expected_hits
from .perturbation import KEPT, Course
from .removal import Removal, entries

STEPS = tuple(step / 10 for step in range(10))  # 0 to 0.9


def drawn(relevance: Tensor, batch: Batch) -> Tensor:
    """Maps of pictures as Chefer et al. 2021 measure them: one value a patch is drawn over its pixels bilinearly, a map
    of pixels stays as it is.

    Args: relevance: (B, Y, X). Returns: the same shape.
    """
    known = batch.units
    if not isinstance(known, ImageUnits) or known.grid is None:
        return relevance
    groups = units.groups(batch)
    means = units.pooled(relevance, groups)
    if not torch.allclose(units.spread(means, groups), relevance, rtol=1e-4, atol=1e-12):
        return relevance
    return F.interpolate(means.view(-1, 1, *known.grid), relevance.shape[1:], mode="bilinear")[:, 0]


def blackened(subject: Subject, batch: Batch) -> Removal:
    """Pixels, each a unit of its own, taken out of pictures by painting them black, as Chefer et al. 2021 do.

    Raises: ValueError for what is no picture, or a model whose mean and standard deviation are not known.
    """
    if not isinstance(batch.units, ImageUnits) or subject.mean is None:
        raise ValueError("black is a colour of pictures whose mean and standard deviation are known; choose a baseline")
    source = rows.leaf(batch)[1]
    black = -torch.tensor(subject.mean) / torch.tensor(subject.std)  # (C,)
    black = black.to(source)[:, None, None]
    groups = torch.arange(source.shape[2] * source.shape[3]).view(1, *source.shape[2:]).expand(batch.rows, -1, -1)

    def without(which: Tensor, gone: Tensor) -> Batch:
        holes = entries(gone, groups.to(source.device)[which])[:, None]  # (R, 1, Y, X)
        return rows.put(batch.take(which), torch.where(holes, black, source[which]))

    return Removal(groups, torch.full((batch.rows,), groups[0].numel()), "black", without)


@contextmanager
def zeroed(subject: Subject, batch: Batch) -> Iterator[Removal]:
    """Tokens taken out of a text by setting their vectors to zero, as Achtibat et al. 2024 do; positions stay.

    For the while of the context the model's table has one more vector, of zeros.
    """
    ids = rows.leaf(batch)[1]
    table = looked_up(subject, batch, ids)
    groups, nothing = units.groups(batch), len(table.weight)

    def without(which: Tensor, gone: Tensor) -> Batch:
        return rows.put(batch.take(which), ids[which].masked_fill(entries(gone, groups.to(ids.device)[which]), nothing))

    with extended(table, torch.zeros_like(table.weight[:1])):
        yield Removal(groups, groups.flatten(1).amax(1) + 1, "zero vector", without)


def accuracy_area(course: Course) -> Tensor:
    """Area under the accuracy while units go, in percent: 100 int_0^0.9 1[argmax z(f) = c] df, steps of a tenth, the
    whole input among them, by the trapezoid rule and not divided by the width, so that 90 is the most.

    The mean over the rows, wrong ones among them, is the number of Chefer et al. 2021, table 1. Most relevant first it
    is the positive one, lower is better; least relevant first the negative one, higher is better. Returns: (B,).
    """
    kept = course.removing(STEPS)[..., KEPT]
    return 100 * torch.trapezoid(kept, torch.tensor(STEPS, dtype=kept.dtype))


def right_parts(relevance: Tensor, mask: Tensor) -> tuple[float, float]:
    """Share of all pixels that are marked and told so, and that are ground and told so, the map cut at its mean.

    Their sum is the pixel accuracy; `pooled_iou` of their means over pictures of one size is the mean intersection over
    union as Chefer et al. 2021 pool it over the data.

    Args: relevance: (Y, X). mask: bool, (Y, X). Raises: Undefined as of `localisation.pixel_accuracy`.
    """
    relevance, mask = _both(relevance, mask)
    told = relevance > relevance.mean()
    return float((told & mask).double().mean()), float((~told & ~mask).double().mean())


def pooled_iou(foreground: float, ground: float) -> float:
    """Mean over foreground and ground of intersection over union, both summed over all pictures: (f / (1 - g) + g / (1
    - f)) / 2, since what is in neither union is what is told right of the other.

    >>> pooled_iou(0.25, 0.75), pooled_iou(0.25, 0.25)
    (1.0, 0.3333333333333333)
    """
    return (foreground / (1 - ground) + ground / (1 - foreground)) / 2


def joint_average_precision(relevance: Tensor, mask: Tensor) -> float:
    """Average precision of foreground and ground in one ranking, by R and 1 - R, R scaled to 0 to 1. Higher is better.

    As Chefer et al. 2021 compute mAP. It depends on the scaling: what counts is how far R is from the middle of its
    range. Raises: as of `right_parts`.
    """
    from sklearn.metrics import average_precision_score

    relevance, mask = _both(relevance, mask)
    scaled = (relevance - relevance.min()) / (relevance.max() - relevance.min())
    return float(average_precision_score(torch.cat([~mask, mask]).numpy(), torch.cat([1 - scaled, scaled]).numpy()))


def top_f1(relevance: Tensor, marked: Tensor, count: int) -> float:
    """F1 of the `count` most relevant words against the marked ones, as in the curves of Chefer et al. 2021.

    F1 = 2 |P and m| / (|P| + |m|); what ties at the last place counts by its expectation. With fewer words than that,
    all are taken.

    Args: relevance: of each word, (U,). marked: bool, (U,). Raises: Undefined for a map that says nothing or a
        rationale of no words or of all.
    """
    relevance, marked = _both(relevance, marked)
    count = min(count, len(marked))
    return 2 * expected_hits(relevance, marked, count) / (count + int(marked.sum()))


def top_iou(relevance: Tensor, marked: Tensor) -> float:
    """Intersection over union of the marked words and as many of the most relevant: h / (2 K - h), h hits of K.

    Args, Raises: as of `top_f1`.
    """
    relevance, marked = _both(relevance, marked)
    count = int(marked.sum())
    hits = expected_hits(relevance, marked, count)
    return hits / (2 * count - hits)


def _both(relevance: Tensor, marked: Tensor) -> tuple[Tensor, Tensor]:
    """Map and marks, flat, on the CPU, once they fit and say something."""
    if relevance.shape != marked.shape:
        raise ValueError(f"marks of {tuple(marked.shape)} for relevance of {tuple(relevance.shape)}; give them at its "
                         "size")
    marked = marked.detach().cpu().flatten().bool()
    if not marked.any() or marked.all():
        raise Undefined(f"{'everything' if marked.any() else 'nothing'} is marked: every map would do as well")
    return statistics.told(relevance.detach().cpu().flatten().double()), marked
