"""Word labels: whether the sign and size of relevance agree with what people say each word contributes.

The labels are signed in the direction of the target: positive where people find that the word speaks for it. Data:
R. Socher et al., "Recursive Deep Models for Semantic Compositionality Over a Sentiment Treebank", EMNLP 2013, where
every word of a review has a sentiment.

Reference: P. Atanasova et al., "A Diagnostic Study of Explainability Techniques for Text Classification", EMNLP 2020
(agreement with human labels of words).
"""
from __future__ import annotations

from torch import Tensor

from ..errors import Undefined
from . import statistics


def rank_correlation(relevance: Tensor, labels: Tensor) -> float:
    """Spearman's rank correlation of the words' relevance with their labels. Higher is better.

    rho = corr(rank R, rank l), ties by their mean rank (scipy's `spearmanr`). From -1 to 1, chance is 0.

    Args: relevance: of each word, (U,). labels: how much each speaks for the target, (U,), any unit.
    Raises: ValueError for another number of words; Undefined for a map, or labels, that are the same everywhere.
    """
    from scipy import stats

    relevance, labels = _both(relevance, labels)
    if (labels == labels[0]).all():
        raise Undefined(f"all {len(labels)} words have the label {labels[0].item():g}: there is no order to agree with")
    return float(stats.spearmanr(relevance.numpy(), labels.numpy()).statistic)


def sign_agreement(relevance: Tensor, labels: Tensor) -> float:
    """Share of the labelled words whose relevance has the sign of the label; no relevance agrees by half. Higher is
    better.

    Neutral words (label 0) are left out. Chance is 0.5; a map without signs gets the share of positive labels.

    Args: as of `rank_correlation`.
    Raises: ValueError for another number of words; Undefined for a map that is the same everywhere, and where all
        labels are 0.
    """
    relevance, labels = _both(relevance, labels)
    some = labels != 0
    if not some.any():
        raise Undefined("every word is labelled neutral: there is no sign to agree with")
    return float((relevance[some].sign() * labels[some].sign() + 1).mean() / 2)


def _both(relevance: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if relevance.ndim != 1 or relevance.shape != labels.shape:
        raise ValueError(f"labels of shape {tuple(labels.shape)} for the relevance of words of shape "
                         f"{tuple(relevance.shape)}; give one for each word, (U,)")
    labels = labels.detach().cpu().double()
    if not labels.isfinite().all():
        raise ValueError("the labels hold NaN or inf; label every word, 0 where it is neutral")
    return statistics.told(relevance.detach().cpu().double()), labels
