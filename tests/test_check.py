"""The ablation check on models whose true order is known, and what it must not say."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import CLS, MASK, SEP, TOKENIZER, bert, gpt2, images, targets, text, vit
from torch import nn

from relprop import check, neutral, units
from relprop.check import statistics
from relprop.check.removal import removal
from relprop.subject import Subject
from relprop.tokens import Batch, TensorUnits

QUIET = {"show_progress": False}


class Words(nn.Module):
    """A text model whose output is the sum of its tokens' weights; padding and the mask token weigh nothing."""

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(weights[:, None])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return (self.embedding(input_ids) * attention_mask[..., None]).sum(1)  # (B, 1)


class Patches(nn.Module):
    """An image model whose output is a weighted sum of its pixels."""

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)  # (Y, X)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels * self.weights).sum((1, 2, 3))[:, None]  # (B, 1)


def words(count: int = 10) -> tuple[Subject, Batch, torch.Tensor]:
    """A transparent text model, a batch of two rows, and the true map."""
    weights = torch.zeros(40, dtype=torch.float64)
    weights[4:] = torch.randn(36, dtype=torch.float64)
    ids = (torch.randperm(36) + 4).tolist()
    batch = text([CLS, *ids[:count], SEP], [CLS, *ids[count:count + 7], SEP])
    return Subject(Words(weights), TOKENIZER, "text"), batch, weights[batch.kwargs["input_ids"]]


def patches() -> tuple[Subject, Batch, torch.Tensor]:
    """A transparent image model on a dark ground, two pictures, and the true map."""
    weights = torch.randn(8, 8, dtype=torch.float64)
    pixels = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    pixels[:, :, :4, :4] = torch.rand(2, 1, 4, 4, dtype=torch.float64)  # ink on a quarter: the median is the ground
    return Subject(Patches(weights)), images(pixels, 2), (pixels * weights)[:, 0]


TOYS = {"words": words, "patches": patches}


def run(toy: tuple[Subject, Batch, torch.Tensor], relevance: torch.Tensor | None = None, **options):
    subject, batch, truth = toy
    return check.ablation(subject, batch, targets(0, batch, labels=1), truth if relevance is None else relevance,
                          **QUIET | options)


# What a check must say -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_the_truth_has_the_largest_area_and_its_reverse_the_smallest(seed, toy):
    toy = toy()
    best, worst = run(toy, randoms=30), run(toy, -toy[2], randoms=30)
    assert best.p_value == 1 / 31 and worst.p_value == 1
    assert (best.area > 0).all() and (best.random_area.abs() < best.area + 1e-6).all()
    torch.testing.assert_close(worst.area, -best.area)
    torch.testing.assert_close(best.morf, worst.lerf)
    assert abs(best.random_area.mean()) < best.area.mean() / 4  # chance is about zero
    assert torch.equal(best.random, worst.random)  # the map has no say in chance: maps meet the same orders


def test_the_curves_are_those_of_a_loop_by_hand(seed):
    subject, batch, truth = words()
    found = run((subject, batch, truth), steps=5, randoms=3)
    weights = subject.model.embedding.weight[:, 0]
    for row, count in enumerate((10, 7)):
        ids = batch.kwargs["input_ids"][row, 1:1 + count]
        order = weights[ids].sort(descending=True).values
        whole = weights[batch.kwargs["input_ids"][row]].sum()
        gone = [int((torch.tensor(step / 5, dtype=torch.float64) * count).round()) for step in range(6)]
        morf = torch.stack([whole - order[:k].sum() for k in gone])
        lerf = torch.stack([whole - order[count - k:].sum() for k in gone])
        torch.testing.assert_close(found.morf[row], morf.float())
        torch.testing.assert_close(found.lerf[row], lerf.float())
        area = sum((lerf - morf)[i] + (lerf - morf)[i + 1] for i in range(5)) / 10
        torch.testing.assert_close(found.area[row], area.float())
    torch.testing.assert_close(found.value, truth.sum(1).float())
    torch.testing.assert_close(found.morf[:, -1], found.lerf[:, -1])  # nothing is left


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_a_shuffled_map_is_not_better_than_chance(seed, toy):
    values = []
    for number in range(12):
        made = toy()
        groups = units.groups(made[1])
        pooled = units.pooled(made[2], groups)
        noise = torch.stack([row[torch.randperm(len(row))] for row in torch.randn_like(pooled)])
        values.append(run(made, units.spread(noise, groups), randoms=19, steps=4, seed=number).p_value)
    assert min(values) < 0.5 < max(values) and sum(value <= 0.1 for value in values) <= 5  # about uniform in [0.05, 1]


def test_ties_do_not_help(seed):
    subject, batch, truth = words()
    flat = torch.zeros_like(truth)
    flat[:, 1] = 1e-12  # all but one unit tie
    areas = [run((subject, batch, truth), flat, seed=number, randoms=1, steps=4).area for number in range(6)]
    assert torch.stack(areas).std(0).min() > 0  # drawn anew, not by place


@pytest.mark.parametrize("change, message", [
    (lambda truth: torch.zeros_like(truth), "row 0: the map is 0 on all 10 units: there is nothing to rank"),
    (lambda truth: truth * torch.nan, "NaN"), (lambda truth: truth / 0, "inf"),
    (lambda truth: truth[:, 1:], "does not fit")])
def test_a_map_that_says_nothing_is_an_error(seed, change, message):
    toy = words()
    with pytest.raises(ValueError, match=message):
        run(toy, change(toy[2]))


def test_only_a_rows_own_units_are_removed_and_special_tokens_never(seed):
    subject, batch, truth = words()
    seen = []
    subject.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].clone()), with_kwargs=True)
    run((subject, batch, truth), steps=3, randoms=2)
    ids = torch.cat(seen)
    special = torch.isin(batch.kwargs["input_ids"], torch.tensor([0, CLS, SEP]))
    rows = torch.where(special[None], batch.kwargs["input_ids"][None], -1)
    kept = (((ids[:, None] == rows) | ~special).all(-1)).any(1)
    assert kept.all()
    assert (ids == MASK).sum(1).max() == 10  # everything else goes at the end


def test_the_prediction_stays_the_class_that_was_explained(seed):
    subject, batch, truth = words()

    class Signed(Words):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            score = super().forward(input_ids, attention_mask)
            return torch.cat([score, -score], 1)  # taking units out changes which is larger

    subject = Subject(Signed(subject.model.embedding.weight[:, 0]), TOKENIZER, "text")
    classes = [0 if total > 0 else 1 for total in truth.sum(1)]
    truth = truth * truth.sum(1, keepdim=True).sign()  # of the class in question
    predicted, given = (check.ablation(subject, batch, targets(spec, batch, labels=2), truth, **QUIET)
                        for spec in (None, classes))
    assert torch.equal(predicted.morf, given.morf) and (given.morf < 0).any()


# What it costs and gives back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_forwards_are_counted_and_bounded(seed, toy, batch_size):
    made = toy()
    rows: list[int] = []
    made[0].model.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    found = run(made, steps=4, randoms=3, batch_size=batch_size)
    assert sum(rows) == found.forwards <= 2 * (2 + 2 * 4 * 3)
    assert max(rows) <= batch_size
    torch.testing.assert_close(found.morf, run(made, steps=4, randoms=3).morf)


def test_inputs_that_are_equal_run_once(seed):
    subject, batch, truth = words(2)  # two units: one step between nothing and everything, whatever the steps
    batch = batch.take([0])
    found = run((subject, batch, truth[:1]), steps=50, randoms=3)
    assert found.forwards == 1 + 2 * 4 + 1
    assert found.morf.shape == (1, 51)


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_a_batch_equals_the_loop(seed, toy):
    subject, batch, truth = toy()
    together = run((subject, batch, truth), steps=5, randoms=4)
    for row in range(2):
        single = run((subject, batch.take([row]), truth[row:row + 1]), steps=5, randoms=4)
        for name in ("morf", "lerf", "area", "value"):
            torch.testing.assert_close(getattr(together, name)[row:row + 1], getattr(single, name))
        torch.testing.assert_close(together.random[:, row:row + 1], single.random)
        assert single.interval is None and together.interval is not None
        low, high = together.interval
        assert low <= together.area.mean() <= high


def test_padding_does_not_change_the_random_orders(seed):
    subject, batch, truth = words()
    together = run((subject, batch, truth), randoms=4)
    short = text(batch.kwargs["input_ids"][1, :9].tolist())
    torch.testing.assert_close(together.random[:, 1:], run((subject, short, truth[1:, :9]), randoms=4).random)


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_the_seed_decides(seed, toy):
    made = toy()
    first, again, other = run(made, seed=1), run(made, seed=1), run(made, seed=2)
    assert torch.equal(first.random, again.random) and first.p_value == again.p_value
    assert first.interval == again.interval
    assert not torch.equal(first.random, other.random)
    assert torch.equal(first.morf, other.morf)


def test_the_model_is_given_back_also_after_an_exception(seed):
    subject, batch, truth = words()
    subject.model.train()
    modes = []
    handle = subject.model.register_forward_hook(lambda module, args, output: modes.append(module.training))
    run((subject, batch, truth), randoms=1)
    with pytest.raises(ZeroDivisionError):
        check.ablation(subject, batch, targets(lambda output: 1 / 0, batch), truth, **QUIET)
    handle.remove()
    assert not any(modes) and subject.model.training and torch.is_grad_enabled()


@pytest.mark.parametrize("options, message", [
    ({"randoms": 0}, "at least 1"), ({"steps": 0}, "at least 1"), ({"batch_size": 0}, "at least 1"),
    ({"baseline": "blue"}, "no baseline 'blue' for text"), ({"by": "letter"}, "token or word"),
    ({"baseline": "unk"}, "no unk token")])
def test_bad_options_are_errors(seed, options, message):
    with pytest.raises(ValueError, match=message):
        run(words(), **options)


def test_a_row_without_units_is_an_error(seed):
    subject, batch, truth = words()
    with pytest.raises(ValueError, match="row 0 holds nothing"):
        run((subject, text([CLS, SEP]), truth[:1, :2]))


def test_a_target_that_turns_nan_is_an_error(seed):
    subject, batch, truth = words()
    spec = targets(lambda output: 1 / output[:, 0], batch)  # inf where nothing is left
    with pytest.raises(ValueError, match="mask token"):
        check.ablation(subject, batch, spec, truth, **QUIET)


# Units and what stands in their place --------------------------------------------------------------------------------


def test_words_go_as_a_whole(seed):
    subject, batch, truth = words()
    word_ids = [[None if at is None else at // 2 for at in row] for row in batch.units.word_ids]
    batch = replace(batch, units=replace(batch.units, word_ids=word_ids))
    groups = units.groups(batch, by="word")
    assert groups.amax(1).tolist() == [4, 3] and (groups[:, 0] == -1).all()
    torch.testing.assert_close(units.pooled(truth, groups)[0], truth[0, 1:11].view(5, 2).sum(1))
    found = run((subject, batch, truth), by="word", steps=5, randoms=19)
    assert found.p_value == 1 / 20
    with pytest.raises(ValueError, match="only text has words"):
        run(patches(), by="word")


@pytest.mark.parametrize("baseline, name", [
    (None, "mask token"), ("pad", "pad token"), (7, "token 7"), ("delete", "deleted (attention mask)")])
def test_the_baselines_of_text(seed, baseline, name):
    subject, batch, truth = words()
    out = removal(subject, batch, baseline=baseline)
    assert out.baseline == name and out.counts.tolist() == [10, 7]
    gone = torch.zeros(2, 10, dtype=torch.bool)
    gone[:, 2] = True
    without = out.without(torch.tensor([1, 0]), gone)
    changed = without.kwargs["input_ids"] != batch.kwargs["input_ids"][[1, 0]]
    hidden = without.kwargs["attention_mask"] != batch.kwargs["attention_mask"][[1, 0]]
    expected = torch.zeros(2, 12, dtype=torch.bool)
    expected[:, 3] = True  # after the class token
    assert torch.equal(hidden if baseline == "delete" else changed, expected)
    assert not (changed if baseline == "delete" else hidden).any()


@pytest.mark.parametrize("baseline", neutral.PICTURES)
def test_the_baselines_of_pictures(seed, baseline):
    pixels = torch.rand(2, 3, 8, 8)
    batch = images(pixels, 2)
    out = removal(Subject(nn.Identity()), batch, baseline=baseline)
    gone = torch.zeros(2, 16, dtype=torch.bool)
    gone[0, 5] = gone[1, 15] = True
    without = out.without(torch.tensor([0, 1]), gone).args[0]
    changed = (without != pixels).any(1)  # (B, Y, X)
    places = torch.zeros(2, 8, 8, dtype=torch.bool)
    places[0, 2:4, 2:4] = places[1, 6:, 6:] = True
    assert torch.equal(changed, places)
    flat = pixels[0].flatten(1)
    value = {"median": flat.median(1).values, "mean": flat.mean(1), "zero": torch.zeros(3)}.get(baseline)
    if value is not None:
        torch.testing.assert_close(without[0, :, 2:4, 2:4], value[:, None, None].expand(3, 2, 2))


def test_a_blur_keeps_what_is_flat_and_removes_detail(seed):
    pixels = torch.randn(1, 1, 64, 64) + 3
    blurred, _ = neutral.picture(pixels, "blur")
    assert blurred.std() < pixels.std() / 10
    torch.testing.assert_close(blurred.mean(), pixels.mean(), rtol=0.05, atol=0)
    flat = torch.full((1, 2, 5, 9), 0.5)
    torch.testing.assert_close(neutral.picture(flat, "blur")[0], flat)


def test_plain_tensors_lose_positions_cells_or_features(seed):
    features = torch.randn(2, 6, dtype=torch.float64)
    network = nn.Linear(6, 1, bias=False).double()
    truth = features * network.weight.detach()
    batch = Batch((features,), {}, 2, TensorUnits((2, 6)))
    assert run((Subject(network), batch, truth), randoms=19).baseline == "zero"
    positions = torch.randn(2, 6, 3, dtype=torch.float64)
    batch = Batch((positions,), {}, 2, TensorUnits((2, 6, 3)))
    spec = targets(lambda output: output.sum((1, 2)), batch)
    found = check.ablation(Subject(nn.Linear(3, 2).double()), batch, spec, positions.sum(-1), **QUIET)
    assert found.baseline == "mean over positions"
    pixels = torch.rand(2, 1, 20, 20, dtype=torch.float64)
    batch = Batch((pixels,), {}, 2, TensorUnits((2, 1, 20, 20)))
    assert removal(Subject(network), batch).counts.tolist() == [49, 49]  # cells of 3 pixels
    ids = Batch((torch.tensor([[4, 5, 6]]),), {}, 1, TensorUnits((1, 3)))
    with pytest.raises(ValueError, match="give the id of a token"):
        removal(Subject(network), ids)
    assert removal(Subject(network), ids, baseline=1).counts.tolist() == [3]


@pytest.mark.parametrize("size, patch, grid, last, outside", [
    ((8, 8), (2, 4), None, 7, 0), ((9, 8), (4, 4), None, 3, 8), ((20, 20), None, None, 48, 0),
    ((8, 6), None, (4, 3), 11, 0)])
def test_patches_are_numbered_row_by_row(size, patch, grid, last, outside):
    numbers = units.patches(size, patch=patch, grid=grid)
    assert numbers.shape == size and numbers.max() == last and (numbers == -1).sum() == outside
    values = torch.randn(1, last + 1, dtype=torch.float64)
    spread = units.spread(values, numbers[None])
    torch.testing.assert_close(units.pooled(spread, numbers[None]), values)
    assert (spread[0][numbers == -1] == 0).all()


# Statistics ----------------------------------------------------------------------------------------------------------


def test_order_is_from_most_to_least(seed):
    relevance = torch.randn(50)
    assert torch.equal(statistics.order(relevance), relevance.argsort(descending=True))
    assert statistics.order(torch.tensor([2.0])).tolist() == [0]
    tied = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, -1.0])
    orders = {tuple(statistics.order(tied, torch.Generator().manual_seed(i)).tolist()) for i in range(20)}
    assert len(orders) > 5 and all(order[0] == 0 and order[-1] == 5 for order in orders)
    for bad in (torch.zeros(0), torch.zeros(3), torch.tensor([0.0, torch.nan]), torch.zeros(2, 2)):
        with pytest.raises(ValueError):
            statistics.order(bad)


def test_area_does_not_depend_on_the_number_of_steps():
    for steps in (2, 10, 40):
        fractions = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        torch.testing.assert_close(statistics.area(fractions, 1 - fractions, 1 + fractions).item(), 1.0)


def test_p_value_is_never_zero_and_one_at_worst():
    random = torch.linspace(-1, 1, 99)
    assert statistics.p_value(2.0, random) == 0.01
    assert statistics.p_value(-2.0, random) == 1.0
    assert statistics.p_value(0.0, random) == 0.51


def test_interval_covers_the_mean_as_often_as_it_says(seed):
    samples = torch.randn(60, 40) + 2
    found = [statistics.interval(sample) for sample in samples]
    assert sum(low < 2 < high for low, high in found) >= 51  # 95 % of 60 is 57
    assert statistics.interval(torch.ones(1)) is None
    assert statistics.interval(torch.ones(3)) == (1.0, 1.0)


# Real architectures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "gpt2", "vit"])
def test_a_tiny_transformer_runs_through(seed, kind):
    from relprop import baselines

    if kind == "vit":
        subject, batch, labels = Subject(vit()), images(torch.randn(2, 3, 24, 24, dtype=torch.float64), 6), 3
    else:
        subject = Subject(bert() if kind == "bert" else gpt2(), TOKENIZER, "text")
        batch, labels = text([CLS, 5, 6, 7, 8, SEP], [CLS, 9, 10, SEP]), 3 if kind == "bert" else None
    spec = targets(None, batch, labels=labels)
    relevance = baselines.input_x_gradient(subject, batch, spec)
    found = check.ablation(subject, batch, spec, relevance.map, steps=3, randoms=2, **QUIET)
    torch.testing.assert_close(found.value, relevance.value.float())  # the prediction stays the one that was explained
    assert found.morf.shape == (2, 4) and found.random.shape == (2, 2, 4) and found.random_area.shape == (2, 2)
    assert 1 / 3 <= found.p_value <= 1
