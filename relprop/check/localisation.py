"""Localisation: whether relevance lies where people drew the thing that the target names.

All take the map of one row and its mask, return a number that is larger for a better map, and refuse (`Undefined`) a
map that is the same everywhere and a mask that is empty or full.

References: H. Chefer, S. Gur and L. Wolf, "Transformer Interpretability Beyond Attention Visualization", CVPR 2021
(segmentation, section 4); J. Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016 (pointing
game); L. Arras, A. Osman and W. Samek, "CLEVR-XAI: A Benchmark Dataset for the Ground Truth Evaluation of Neural
Network Explanations", Information Fusion 81, 2022 (relevance mass and rank accuracy).
"""
from __future__ import annotations

from torch import Tensor

from ..errors import Undefined
from . import statistics


def pixel_accuracy(relevance: Tensor, mask: Tensor) -> float:
    """Share of the entries that are told right when the map is cut at its mean. Higher is better.

    (1 / M) sum_i [(R_i > mean R) = m_i] (Chefer et al. 2021, section 4, who cut at the mean as well). Chance depends on
    the size of the mask and on how skewed the map is; a map without skew gets 0.5.

    Args: relevance: a map, any shape and unit. mask: bool, the same shape.
    Raises: ValueError for another shape; Undefined as of the module.
    """
    relevance, mask = _both(relevance, mask)
    return float((_cut(relevance) == mask).double().mean())


def mean_iou(relevance: Tensor, mask: Tensor) -> float:
    """Intersection over union, mean of the foreground's and the ground's, when the map is cut at its mean. Higher is
    better.

    IoU = |A and m| / |A or m|, A = {i: R_i > mean R} (Chefer et al. 2021, section 4).

    Args, Raises: as of `pixel_accuracy`.
    """
    relevance, mask = _both(relevance, mask)
    found = _cut(relevance)
    ious = [float((a & b).sum() / (a | b).sum()) for a, b in ((found, mask), (~found, ~mask))]
    return sum(ious) / 2


def mean_average_precision(relevance: Tensor, mask: Tensor) -> float:
    """Average precision, mean of the foreground's (by R) and the ground's (by -R). Higher is better.

    AP = sum_n (recall_n - recall_{n-1}) precision_n over the thresholds, scikit-learn's. Chefer et al. 2021 (section 4)
    pool both classes after scaling the map to 0 to 1, so that its value depends on the scaling; the mean of the two
    does not. Chance is 0.5, whatever the size of the mask.

    Args, Raises: as of `pixel_accuracy`.
    """
    from sklearn.metrics import average_precision_score

    relevance, mask = (one.numpy() for one in _both(relevance, mask))
    return float(average_precision_score(mask, relevance) + average_precision_score(~mask, -relevance)) / 2


def pointing_game(relevance: Tensor, mask: Tensor) -> float:
    """1 if the largest relevance lies in the mask, else 0; where several tie, the share of them. Higher is better.

    Zhang et al. 2016 (section 4.1) forgive 15 pixels around the mask; here none are. Chance: the share of the map that
    is masked.

    Args, Raises: as of `pixel_accuracy`.
    """
    relevance, mask = _both(relevance, mask)
    return float(mask[relevance == relevance.max()].double().mean())


def relevance_mass(relevance: Tensor, mask: Tensor) -> float:
    """Share of the positive relevance that lies in the mask. Higher is better.

    sum_{i in m} max(R_i, 0) / sum_i max(R_i, 0) (Arras et al. 2022, eq. 1). Chance: the share of the map that
    is masked.

    Args: as of `pixel_accuracy`.
    Raises: as of `pixel_accuracy`; Undefined where no relevance is positive.
    """
    relevance, mask = _both(relevance, mask)
    positive = relevance.clamp(min=0)
    if not positive.any():
        raise Undefined("no relevance is positive, so none of it has a share in the mask")
    return float(positive[mask].sum() / positive.sum())


def relevance_rank(relevance: Tensor, mask: Tensor) -> float:
    """Share of the K largest entries that lie in the mask, K the size of the mask. Higher is better.

    |top_K(R) and m| / K (Arras et al. 2022, eq. 2); what ties at the K-th place counts by its expectation under a
    random order, so that coarse maps gain and lose nothing. Chance: the share of the map that is masked.

    Args, Raises: as of `pixel_accuracy`.
    """
    relevance, mask = _both(relevance, mask)
    return expected_hits(relevance, mask, int(mask.sum())) / int(mask.sum())


def class_mass(relevance: Tensor, mask: Tensor, other: Tensor) -> float:
    """Share of the positive relevance in either of two masks that lies in the target's own. Higher is better.

    M / (M + M'), M = sum_{i in m} max(R_i, 0): 0.5 for a map that does not know which of two things was asked for, 0.75
    where its own holds three times the relevance of the other. The contrast of classes by Chefer et al. 2021 (figure 3)
    as a number.

    Args: relevance: a map, any shape. mask, other: of the target and of another class, bool, the same shape, disjoint.
    Raises: ValueError for another shape or masks that overlap; Undefined for an empty mask, a map that is the same
        everywhere, and where no relevance in either is positive.
    """
    relevance, mask = _both(relevance, mask)
    if other.numel() != mask.numel():
        raise ValueError(f"masks of {mask.numel()} and {other.numel()} entries; give both at the size of the map")
    other = other.detach().cpu().flatten().bool()
    if (mask & other).any():
        raise ValueError(f"the masks of the two classes share {int((mask & other).sum())} entries; they must not")
    own, theirs = (float(relevance[one].clamp(min=0).sum()) for one in (mask, other))
    if not other.any() or own + theirs == 0:
        raise Undefined("no positive relevance in the mask of either class" if other.any() else "an empty second mask")
    return own / (own + theirs)


def expected_hits(relevance: Tensor, mask: Tensor, count: int) -> float:
    """How many of the `count` largest entries are in the mask, ties at the last place by their expectation.

    Args: relevance: (M,). mask: bool, (M,). count: from 1 to M.
    """
    last = relevance.topk(count).values[-1]
    above, level = relevance > last, relevance == last
    share = (count - int(above.sum())) / int(level.sum())  # of those that tie, how many there is room for
    return int((above & mask).sum()) + share * int((level & mask).sum())


def _cut(relevance: Tensor) -> Tensor:
    return relevance > relevance.mean()


def _both(relevance: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Map and mask, flat, on the CPU, once they fit and say something."""
    if relevance.shape != mask.shape:
        raise ValueError(f"a mask of {tuple(mask.shape)} for a map of {tuple(relevance.shape)}; "
                         "give it at the size of the model's input")
    mask = mask.detach().cpu().flatten().bool()
    if not mask.any() or mask.all():
        raise Undefined(f"the mask is {'full' if mask.numel() and mask.all() else 'empty'}: every map would do as well")
    return statistics.told(relevance.detach().cpu().flatten().double()), mask
