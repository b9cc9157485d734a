"""The measures of a map against people's marks: cases by hand, the best, the worst and the chance value of each."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from relprop.check import localisation, rationale, sentiment, statistics
from relprop.errors import Undefined

MASKED = (localisation.pixel_accuracy, localisation.mean_iou, localisation.mean_average_precision,
          localisation.pointing_game, localisation.relevance_mass, localisation.relevance_rank)
MARKED = (rationale.token_f1, rationale.iou_f1, rationale.auprc)
LABELLED = (sentiment.rank_correlation, sentiment.sign_agreement)


def named(functions):
    return pytest.mark.parametrize("measure", functions, ids=lambda f: f.__name__)


# Localisation --------------------------------------------------------------------------------------------------------

MAP = torch.tensor([[4.0, 1.0, 0.0], [3.0, -2.0, 0.0]])  # mean 1
MASK = torch.tensor([[True, True, False], [False, False, False]])


def test_localisation_by_hand():
    # above the mean: 4 and 3. Right: 4 (in), 0, -2, 0 (out); wrong: 1 (in, not found), 3 (out, found)
    assert localisation.pixel_accuracy(MAP, MASK) == pytest.approx(4 / 6)
    assert localisation.mean_iou(MAP, MASK) == pytest.approx((1 / 3 + 3 / 5) / 2)
    # foreground: 4 at precision 1, then 1 at 2/3. Ground by -R: -2, then 0 and 0 together, then 1, then 3 last but one
    foreground = (1 + 2 / 3) / 2
    ground = (1 / 4) * 1 + (2 / 4) * 1 + (1 / 4) * (4 / 5)
    assert localisation.mean_average_precision(MAP, MASK) == pytest.approx((foreground + ground) / 2)
    assert localisation.pointing_game(MAP, MASK) == 1
    assert localisation.relevance_mass(MAP, MASK) == pytest.approx(5 / 8)
    assert localisation.relevance_rank(MAP, MASK) == pytest.approx(1 / 2)


@named(MASKED)
def test_the_mask_itself_is_best_and_its_negative_worst(measure):
    perfect = MASK.double() + torch.rand(2, 3, dtype=torch.float64) * 0.1
    assert measure(MASK.double(), MASK) == measure(perfect - 0.1, MASK) == 1
    if measure is localisation.relevance_mass:  # nothing is positive in the mask
        assert measure(0.5 - MASK.double(), MASK) == 0
    else:
        assert measure(-perfect, MASK) < 0.45


@named(MASKED)
def test_a_random_map_gets_the_chance_value(seed, measure):
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[:10, :8] = True  # a fifth
    values = [measure(torch.randn(20, 20), mask) for _ in range(300)]
    half, share = 0.5, 0.2
    iou = sum(half * part / (part + half - half * part) for part in (share, 1 - share)) / 2
    chance = {"pixel_accuracy": half, "mean_iou": iou, "mean_average_precision": half}.get(measure.__name__, share)
    assert np.mean(values) == pytest.approx(chance, abs=4 * np.std(values) / 300**0.5 + 0.01)


def test_ties_count_by_their_expectation():
    coarse = torch.tensor([1.0, 1.0, 1.0, 0.0])
    mask = torch.tensor([True, False, False, False])
    assert localisation.pointing_game(coarse, mask) == pytest.approx(1 / 3)
    assert localisation.relevance_rank(coarse, mask) == pytest.approx(1 / 3)
    assert rationale.token_f1(coarse, mask) == pytest.approx(1 / 3)
    assert localisation.expected_hits(coarse, mask, 2) == pytest.approx(2 / 3)


def test_class_mass_by_hand():
    own, other = torch.tensor([True, True, False, False]), torch.tensor([False, False, True, False])
    assert localisation.class_mass(torch.tensor([2.0, 1.0, 1.0, 9.0]), own, other) == 0.75  # three times as much
    assert localisation.class_mass(torch.tensor([2.0, -5.0, 2.0, 0.0]), own, other) == 0.5
    assert localisation.class_mass(torch.tensor([-1.0, 0.0, 2.0, 0.0]), own, other) == 0
    with pytest.raises(Undefined, match="no positive relevance"):
        localisation.class_mass(torch.tensor([-1.0, 0.0, -2.0, 5.0]), own, other)
    with pytest.raises(ValueError, match="share 1 entries"):
        localisation.class_mass(torch.rand(4), own, own.roll(1))


@named(MASKED)
@pytest.mark.parametrize("relevance, mask, message", [
    (torch.zeros(2, 3), MASK, "the map is 0 on all 6 units"), (torch.full((2, 3), 2.0), MASK, "the map is 2 on all"),
    (MAP * torch.nan, MASK, "NaN"), (MAP, torch.zeros_like(MASK), "the mask is empty"),
    (MAP, torch.ones_like(MASK), "the mask is full"), (torch.zeros(0), torch.zeros(0).bool(), "empty")])
def test_localisation_never_gives_a_number_for_nothing(measure, relevance, mask, message):
    with pytest.raises(Undefined, match=message):
        measure(relevance, mask)


@named(MASKED)
def test_a_mask_of_another_size_is_an_error(measure):
    with pytest.raises(ValueError, match=r"mask of \(3, 3\) for a map of \(2, 3\)") as raised:
        measure(MAP, torch.ones(3, 3).bool())
    assert not isinstance(raised.value, Undefined)  # a slip of the user's, which no table may hide


def test_no_positive_relevance_has_no_mass():
    with pytest.raises(Undefined, match="no relevance is positive"):
        localisation.relevance_mass(-MAP.abs(), MASK)


# Rationales ----------------------------------------------------------------------------------------------------------

WORDS = torch.tensor([5.0, 0.0, 4.0, 3.0, -1.0, 2.0])
REASON = torch.tensor([True, False, False, True, True, False])


def test_rationales_by_hand():
    # top 3: words 0, 2, 3; hits 0 and 3
    assert rationale.token_f1(WORDS, REASON) == pytest.approx(2 / 3)
    assert rationale.token_f1(WORDS, REASON, share=1 / 3) == pytest.approx(2 * 1 / (2 + 3))  # top 2: 0, 2
    assert rationale.token_f1(WORDS, REASON, share=0.01) == pytest.approx(2 * 1 / (1 + 3))  # at least one
    # spans of the top 3: [0, 1), [2, 4). Marked: [0, 1), [3, 5). IoU of [2, 4) and [3, 5) is 1/3
    assert rationale.iou_f1(WORDS, REASON) == pytest.approx(1 / 2)
    # in order: 0 (hit), 2, 3 (hit), 5, 1, 4 (hit)
    assert rationale.auprc(WORDS, REASON) == pytest.approx((1 + 2 / 3 + 3 / 6) / 3)
    assert rationale.spans(REASON) == [(0, 1), (3, 5)]


def test_spans_that_overlap_by_half_are_found():
    marked = torch.tensor([True, True, False, False])
    assert rationale.iou_f1(torch.tensor([9.0, 0, 0, 0]), marked, share=0.25) == 1  # IoU 1/2
    assert rationale.iou_f1(torch.tensor([0.0, 9, 8, 0]), marked, share=0.5) == 0  # IoU 1/3


@named(MARKED)
def test_the_rationale_itself_is_best_and_its_negative_worst(measure):
    assert measure(REASON.double(), REASON) == 1
    perfect = REASON.double() + torch.linspace(0, 0.1, 6)
    assert measure(perfect, REASON) == 1
    assert measure(-perfect, REASON) == 0 or measure is rationale.auprc and measure(-perfect, REASON) < 0.4


@named(MARKED)
def test_a_random_map_finds_a_rationale_by_chance(seed, measure):
    marked = torch.zeros(200, dtype=torch.bool)
    marked[40:90] = True
    values = [measure(torch.randn(200), marked) for _ in range(100)]
    chance = {"token_f1": 0.25, "auprc": 0.25, "iou_f1": 0.0}[measure.__name__]
    assert np.mean(values) == pytest.approx(chance, abs=0.05)


@named(MARKED)
@pytest.mark.parametrize("relevance, marked, message", [
    (torch.zeros(6), REASON, "nothing to rank"), (WORDS / 0, REASON, "NaN or inf"),
    (WORDS, torch.zeros(6).bool(), "no word is marked"), (WORDS, torch.ones(6).bool(), "all words are marked")])
def test_rationales_never_give_a_number_for_nothing(measure, relevance, marked, message):
    with pytest.raises(Undefined, match=message):
        measure(relevance, marked)


@pytest.mark.parametrize("run, message", [
    (lambda: rationale.auprc(WORDS, REASON[1:]), "one for each word"),
    (lambda: rationale.token_f1(WORDS, REASON, share=0), "share is of the words"),
    (lambda: sentiment.rank_correlation(WORDS, torch.zeros(4)), "one for each word"),
    (lambda: sentiment.sign_agreement(WORDS, WORDS * torch.nan), "label every word")])
def test_marks_that_do_not_align_are_errors(run, message):
    with pytest.raises(ValueError, match=message) as raised:
        run()
    assert not isinstance(raised.value, Undefined)


# Word labels ---------------------------------------------------------------------------------------------------------


def test_word_labels_by_hand():
    relevance, labels = torch.tensor([3.0, -1.0, 0.0, 2.0]), torch.tensor([2.0, 1.0, 0.0, -1.0])
    # ranks 4 1 2 3 and 4 3 2 1: 1 - 6 sum d^2 / (n (n^2 - 1)) = 1 - 6 * 8 / 60
    assert sentiment.rank_correlation(relevance, labels) == pytest.approx(0.2)
    assert sentiment.sign_agreement(relevance, labels) == pytest.approx(1 / 3)  # of 3, -1, 2
    assert sentiment.sign_agreement(torch.tensor([1.0, 0.0]), torch.tensor([1.0, -1.0])) == 0.75  # no sign: by half


@named(LABELLED)
def test_labels_themselves_are_best_their_negative_worst_noise_is_chance(seed, measure):
    labels = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0, 0.0])
    worst, chance = (-1, 0) if measure is sentiment.rank_correlation else (0, 0.5)
    assert measure(labels, labels) == pytest.approx(1) and measure(-labels, labels) == pytest.approx(worst)
    assert np.mean([measure(torch.randn(6), labels) for _ in range(400)]) == pytest.approx(chance, abs=0.07)


@pytest.mark.parametrize("measure, relevance, labels, message", [
    (sentiment.rank_correlation, torch.zeros(3), torch.arange(3.0), "nothing to rank"),
    (sentiment.rank_correlation, torch.arange(3.0), torch.ones(3), "all 3 words have the label 1"),
    (sentiment.sign_agreement, torch.ones(3), torch.arange(3.0), "nothing to rank"),
    (sentiment.sign_agreement, torch.arange(3.0), torch.zeros(3), "labelled neutral")])
def test_word_labels_never_give_a_number_for_nothing(measure, relevance, labels, message):
    with pytest.raises(Undefined, match=message):
        measure(relevance, labels)


# Statistics ----------------------------------------------------------------------------------------------------------


def test_a_grouped_interval_is_the_plain_one_without_groups_and_wider_with(seed):
    values = torch.randn(60, dtype=torch.float64)
    plain, single = statistics.interval(values), statistics.grouped_interval(values, range(60))
    assert single == pytest.approx(plain, abs=0.02)
    same = values[:12].repeat_interleave(5)  # five rows that say the same are one
    low, high = statistics.grouped_interval(same, [row // 5 for row in range(60)])
    again = statistics.grouped_interval(values[:12], range(12))
    assert (low, high) == pytest.approx(again, abs=0.02)
    ours, theirs = high - low, np.subtract(*statistics.grouped_interval(same, range(60))[::-1])
    assert ours > 1.8 * theirs  # sqrt(5) times too sure
    assert statistics.grouped_interval(values[:3], "aaa") is None


def test_the_interval_holds_the_mean_as_often_as_it_says(seed):
    held = 0
    for number in range(200):
        low, high = statistics.grouped_interval(torch.randn(40, dtype=torch.float64), range(40), resamples=300,
                                                seed=number)
        held += low <= 0 <= high
    assert 178 <= held <= 200


def test_the_paired_test_by_hand_and_by_chance(seed):
    assert statistics.paired_p_value(torch.tensor([1.0, 2.0, 3.0]), range(3)) == pytest.approx(2 / 8)
    assert statistics.paired_p_value(torch.tensor([1.0, 1, 2, 2, 3, 3]), [0, 0, 1, 1, 2, 2]) == pytest.approx(2 / 8)
    assert statistics.paired_p_value(torch.zeros(5), range(5)) == 1
    sure = statistics.paired_p_value(1 + torch.randn(50), range(50), resamples=999)
    assert 1 / 1000 <= sure <= 4 / 1000
    noise = [statistics.paired_p_value(torch.randn(30), range(30), resamples=199, seed=one) for one in range(60)]
    assert 0.3 < np.mean(noise) < 0.7 and min(noise) < 0.3
    with pytest.raises(Undefined, match="two independent rows"):
        statistics.paired_p_value(torch.ones(3), "aaa")


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.02, 0.03, 0.005]) == pytest.approx([0.03, 0.04, 0.04, 0.02])
    assert statistics.holm([0.6, 0.9]) == [1.0, 1.0] and statistics.holm([]) == []
