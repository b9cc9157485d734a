"""Rationales: whether the words a map calls relevant are those that people marked as the reason.

All take the relevance of one row's words and which of them are marked, return a number that is larger for a better
map, and refuse (`Undefined`) a map that is the same everywhere and a rationale of no words or of all.

Reference: J. DeYoung et al., "ERASER: A Benchmark to Evaluate Rationalized NLP Models", ACL 2020, section 4.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..errors import Undefined
from . import statistics
from .localisation import expected_hits

OVERLAP = 0.5  # of two spans that count as the same


def token_f1(relevance: Tensor, marked: Tensor, *, share: float | None = None) -> float:
    """F1 of the most relevant words against the marked ones. Higher is better.

    F1 = 2 |P and m| / (|P| + |m|), P the k most relevant words. DeYoung et al. 2020 (section 4.1) take k from the mean
    length of the rationales of a data set: k = share x words, at least one. What ties at the k-th place counts by its
    expectation. Chance: 2 k |m| / (U (k + |m|)).

    Args: relevance: of each word, (U,). marked: bool, (U,). share: of the words that is taken; None: as many as are
        marked here.
    Raises: ValueError for another number of words or a share outside (0, 1]; Undefined as of the module.
    """
    relevance, marked = _both(relevance, marked)
    count = _count(marked, share)
    return 2 * expected_hits(relevance, marked, count) / (count + int(marked.sum()))


def iou_f1(relevance: Tensor, marked: Tensor, *, share: float | None = None,
           generator: torch.Generator | None = None) -> float:
    """F1 of the spans of the most relevant words against the marked spans. Higher is better.

    A span (a run of words without a gap) counts as found where some span of the other side has an intersection over
    union with it of at least 0.5 (DeYoung et al. 2020, section 4.1, "partial match").

    Args: as of `token_f1`. generator: of the order in which ties are taken.
    Raises: as of `token_f1`.
    """
    relevance, marked = _both(relevance, marked)
    taken = torch.zeros_like(marked)
    taken[statistics.order(relevance, generator)[:_count(marked, share)]] = True
    ours, theirs = spans(taken), spans(marked)
    precision, recall = _found(ours, theirs), _found(theirs, ours)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def auprc(relevance: Tensor, marked: Tensor) -> float:
    """Area under precision over recall, as words are taken from the most relevant on. Higher is better.

    scikit-learn's average precision; DeYoung et al. 2020 (section 4.1) join the points by the trapezoid rule, which is
    too kind between them. Chance: the share of the words that are marked, and a little more in a short text.

    Args, Raises: as of `token_f1`.
    """
    from sklearn.metrics import average_precision_score

    relevance, marked = _both(relevance, marked)
    return float(average_precision_score(marked.numpy(), relevance.numpy()))


def spans(marked: Tensor) -> list[tuple[int, int]]:
    """Runs of True as (start, end), end excluded.

    >>> spans(torch.tensor([True, True, False, True]))
    [(0, 2), (3, 4)]
    """
    steps = torch.diff(marked.int(), prepend=marked.new_zeros(1).int(), append=marked.new_zeros(1).int())
    starts, ends = ((steps == sign).nonzero().flatten().tolist() for sign in (1, -1))
    return list(zip(starts, ends, strict=True))


def _found(spans: list[tuple[int, int]], among: list[tuple[int, int]]) -> float:
    """Share of the spans that have their like among the others."""
    return sum(any(_iou(one, other) >= OVERLAP for other in among) for one in spans) / len(spans)


def _iou(one: tuple[int, int], other: tuple[int, int]) -> float:
    shared = max(0, min(one[1], other[1]) - max(one[0], other[0]))
    return shared / (one[1] - one[0] + other[1] - other[0] - shared)


def _count(marked: Tensor, share: float | None) -> int:
    if share is None:
        return int(marked.sum())
    if not 0 < share <= 1:
        raise ValueError(f"share is of the words that are taken, in (0, 1], got {share}")
    return max(1, round(share * len(marked)))


def _both(relevance: Tensor, marked: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance and marks, on the CPU, once they fit and say something."""
    if relevance.ndim != 1 or relevance.shape != marked.shape:
        raise ValueError(f"marks of shape {tuple(marked.shape)} for the relevance of words of shape "
                         f"{tuple(relevance.shape)}; give one for each word, (U,)")
    marked = marked.detach().cpu().bool()
    if not marked.any() or marked.all():
        what = "all words are" if len(marked) and marked.all() else "no word is"
        raise Undefined(f"{what} marked: every map would do as well")
    return statistics.told(relevance.detach().cpu().double()), marked
