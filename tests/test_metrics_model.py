"""The measures that ask the model: by hand on transparent models, best for the truth and worst for its reverse."""
from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from test_check import Patches, Words, patches, words
from tiny import CLS, SEP, bert, gpt2, images, targets, text
from torch import nn

from relprop import rows, units
from relprop.check import ablation, control, imputation, infidelity, perturbation, removal, sanity, sensitivity
from relprop.check.perturbation import KEPT, PROBABILITY, VALUE, Readout
from relprop.errors import Undefined
from relprop.explain import explain
from relprop.subject import Subject
from relprop.target import Contrast

TOYS = {"words": words, "patches": patches}
toys = pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)


def prepared(toy, relevance=None, *, spec=0, out=None, seed=0, ends=0):
    """Courses of a toy's map, most and least relevant first."""
    subject, batch, truth = toy
    readout, start = Readout.of(subject, batch, targets(spec, batch, labels=1))
    out = out or removal.removal(subject, batch)
    return perturbation.courses(readout, out, truth if relevance is None else relevance, start, seed=seed, ends=ends)


# Perturbation --------------------------------------------------------------------------------------------------------


def by_hand(toy, row, fraction, most):
    """Value of a text toy's row with this fraction of its words gone."""
    _, batch, truth = toy
    own = truth[row][units.groups(batch)[row] >= 0].sort(descending=most).values
    return truth[row].sum() - own[:round(fraction * len(own))].sum()


def curve_by_hand(toy, row, most):
    return torch.stack([by_hand(toy, row, step / 10, most) for step in range(11)])


def test_a_course_is_a_loop_by_hand(seed):
    toy = words()
    most, least = prepared(toy)
    for course, first in ((most, True), (least, False)):
        found = course.removing(perturbation.TENTHS)
        wanted = torch.stack([curve_by_hand(toy, row, first) for row in (0, 1)])
        torch.testing.assert_close(found[..., VALUE], wanted)
        torch.testing.assert_close(found[..., PROBABILITY], wanted.sigmoid())  # a single logit is a sigmoid's
        torch.testing.assert_close(found[:, :10, KEPT], (wanted[:, :10] > 0).double())  # what is left at last is 0
    assert (most.removing([0.5])[..., VALUE] < least.removing([0.5])[..., VALUE]).all()


def test_a_course_that_is_read_at_its_ends_is_the_curve_unit_by_unit(seed):
    """With all units at the ends, areas are those of the whole curve; a course by tenths misses what is between."""
    toy = words()
    most, least = prepared(toy, ends=20)
    for course, first in ((most, True), (least, False)):
        fractions, found = course.along()
        for row in (0, 1):
            count = int(course.removal.counts[row])
            whole = torch.stack([by_hand(toy, row, gone / count, first) for gone in range(count + 1)])
            at = (fractions[row] * count).round().long()
            assert set(at.tolist()) == set(range(count + 1)) and (at.diff() >= 0).all()
            torch.testing.assert_close(found[row, :, VALUE], whole[at])
            kept = perturbation.positive_auc(course)[row]
            assert kept == pytest.approx(float(torch.trapezoid((whole > 0)[1:-1].double())) / (count - 2))
    inner, _ = most.along(inner=True)
    assert inner.min() > 0 and inner.max() < 1
    tenths = [perturbation.area(*prepared(toy, ends=ends)) for ends in (0, 20)]
    assert tenths[0].all() and not torch.allclose(*tenths)


def test_the_measures_by_hand(seed):
    toy = words()
    most, least = prepared(toy)
    height = lambda values: ((values[1:] + values[:-1]) / 2).mean()
    for row in (0, 1):
        down, up = (curve_by_hand(toy, row, first) for first in (True, False))
        assert perturbation.positive_auc(most)[row] == pytest.approx(float(height((down > 0)[1:10].double())))
        assert perturbation.negative_auc(least)[row] == pytest.approx(float(height((up > 0)[1:10].double())))
        assert perturbation.deletion(most)[row] == pytest.approx(float(height(down.sigmoid())))
        assert perturbation.insertion(least)[row] == pytest.approx(float(height(up.sigmoid())))
        own = toy[2][row][units.groups(toy[1])[row] >= 0].sort(descending=True).values
        whole, top = own.sum().sigmoid(), [math.ceil(k * len(own)) for k in perturbation.BINS]
        gone = [whole - own[k:].sum().sigmoid() for k in top]
        left = [whole - own[:k].sum().sigmoid() for k in top]
        assert perturbation.comprehensiveness(most)[row] == pytest.approx(float(sum(gone) / 5))
        assert perturbation.sufficiency(least)[row] == pytest.approx(float(sum(left) / 5))


@toys
def test_the_area_is_that_of_the_ablation_check(seed, toy):
    toy = toy()
    noise = torch.randn_like(toy[2])
    curve = ablation(toy[0], toy[1], targets(0, toy[1], labels=1), noise, randoms=1, show_progress=False, seed=3)
    torch.testing.assert_close(perturbation.area(*prepared(toy, noise, seed=3)).float(), curve.area)
    assert curve.area.abs().min() > 0


READ = {
    "area": (lambda most, least: perturbation.area(most, least), True),
    "positive-auc": (lambda most, least: perturbation.positive_auc(most), False),
    "negative-auc": (lambda most, least: perturbation.negative_auc(least), True),
    "deletion": (lambda most, least: perturbation.deletion(most), False),
    "insertion": (lambda most, least: perturbation.insertion(least), True),
    "comprehensiveness": (lambda most, least: perturbation.comprehensiveness(most), True),
    "sufficiency": (lambda most, least: perturbation.sufficiency(least), False),
    "road": (lambda most, least: perturbation.road(most, least), True),
}


@toys
@pytest.mark.parametrize("name", READ)
def test_the_truth_is_best_its_reverse_worst_chance_between(seed, toy, name):
    measure, higher = READ[name]
    toy = toy()
    best, worst = (measure(*prepared(toy, relevance)).mean() for relevance in (toy[2], -toy[2]))
    noise = torch.stack([measure(*prepared(toy, torch.randn_like(toy[2]))).mean() for _ in range(6)]).mean()
    assert best != worst
    assert (worst <= noise <= best) if higher else (best <= noise <= worst)


def test_what_was_run_is_not_run_again(seed):
    toy = words()
    rows_run: list[int] = []
    toy[0].model.register_forward_hook(lambda module, args, output: rows_run.append(len(output)))
    most, least = prepared(toy)
    whole = sum(rows_run)
    perturbation.area(most, least)
    once = sum(rows_run) - whole
    assert once == most.forwards + least.forwards == 2 * (10 + 7)  # every count from 1 to all, two orders
    perturbation.deletion(most), perturbation.insertion(least), perturbation.positive_auc(most)
    assert sum(rows_run) - whole == once


def test_a_decision_is_the_largest_logit_or_a_positive_one(seed):
    batch = images(torch.rand(2, 1, 4, 4, dtype=torch.float64), 2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False).double())
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([-torch.ones(16), -2 * torch.ones(16), -3 * torch.ones(16)]))
    read = {many: Readout.of(Subject(model), batch, Subject(model, labels=("a", "b", "c"), multilabel=many).targets(
        [0, 1], 2))[1] for many in (False, True)}
    assert read[False][:, KEPT].tolist() == [1, 0] and read[True][:, KEPT].tolist() == [0, 0]
    z = model(batch.args[0])
    torch.testing.assert_close(read[False][:, PROBABILITY], torch.stack([z.softmax(1)[0, 0], z.softmax(1)[1, 1]]))
    torch.testing.assert_close(read[True][:, PROBABILITY], torch.stack([z[0, 0], z[1, 1]]).sigmoid())


def test_what_has_no_probability_says_so(seed):
    subject, batch, truth = words()
    readout, start = Readout.of(subject, batch, targets(Contrast(0, 0), batch, labels=1))
    assert start[:, PROBABILITY].isnan().all()
    most, least = perturbation.courses(readout, removal.removal(subject, batch), truth, start)
    assert perturbation.area(most, least).isfinite().all()
    for measure in (perturbation.deletion, perturbation.positive_auc, perturbation.comprehensiveness):
        with pytest.raises(ValueError, match="the target is a Contrast"):
            measure(most)


@pytest.mark.parametrize("change, kind, message", [
    (lambda truth: torch.zeros_like(truth), Undefined, "nothing to rank"), (lambda truth: truth / 0, Undefined, "inf"),
    (lambda truth: truth[:, 1:], ValueError, "does not fit")])
def test_perturbation_never_gives_a_number_for_nothing(seed, change, kind, message):
    toy = words()
    subject, batch, truth = toy
    with pytest.raises(kind, match=message):
        prepared(toy, change(truth))
    readout, _ = Readout.of(subject, batch, targets(0, batch, labels=1))
    with pytest.raises(kind, match=message):
        infidelity.infidelity(readout, removal.removal(subject, batch), change(truth))


# Imputation ----------------------------------------------------------------------------------------------------------


def test_missing_pixels_are_the_mean_of_their_neighbours(seed):
    picture, missing = torch.randn(2, 5, 6, dtype=torch.float64), torch.rand(5, 6) < 0.5
    filled = imputation.linear(picture, missing)
    assert torch.equal(filled[:, ~missing], picture[:, ~missing]) and missing.any()
    for y, x in missing.nonzero().tolist():
        around = {(y + down, x + right): weight for (down, right), weight in imputation.NEIGHBOURS.items()
                  if 0 <= y + down < 5 and 0 <= x + right < 6}
        mean = sum(filled[:, i, j] * weight for (i, j), weight in around.items()) / sum(around.values())
        torch.testing.assert_close(filled[:, y, x], mean)
    assert sum(imputation.NEIGHBOURS.values()) == pytest.approx(1)
    full = torch.ones(5, 6, dtype=torch.bool)
    torch.testing.assert_close(imputation.linear(picture, full), picture.mean((1, 2), keepdim=True).expand(2, 5, 6))


def test_imputed_units_are_noisy_and_the_rest_is_kept(seed):
    subject, batch, _ = patches()
    out = imputation.imputed(subject, batch, seed=1)
    gone = torch.zeros(2, 16, dtype=torch.bool)
    gone[0, 5] = gone[1, 0] = True
    changed, source = out.without(torch.tensor([1, 0]), gone).args[0], batch.args[0][[1, 0]]
    outside = torch.ones(2, 8, 8, dtype=torch.bool)
    outside[0, 2:4, 2:4] = outside[1, :2, :2] = False
    assert torch.equal(changed[:, 0][outside], source[:, 0][outside]) and not torch.equal(changed, source)
    again, other = (imputation.imputed(subject, batch, seed=one).without(torch.tensor([1, 0]), gone).args[0]
                    for one in (1, 2))
    assert torch.equal(again, changed)
    assert 0 < (other - changed).abs().max() < 0.1  # noise of a hundredth of the range
    with pytest.raises(ValueError, match="no picture"):
        imputation.imputed(*words()[:2])


# Infidelity and sensitivity ------------------------------------------------------------------------------------------


@toys
def test_a_linear_models_own_map_is_faithful_whatever_its_scale(seed, toy):
    toy = toy()
    subject, batch, truth = toy
    readout, _ = Readout.of(subject, batch, targets(0, batch, labels=1))
    out = removal.removal(subject, batch, baseline="zero" if toy[2].ndim == 3 else None)
    run = lambda relevance: infidelity.infidelity(readout, out, relevance, samples=30)
    torch.testing.assert_close(run(truth), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(run(7 * truth), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    worst, noise = run(-truth), run(torch.randn_like(truth))
    assert (noise > 1e-3).all() and (worst >= noise - 1e-12).all()


def test_infidelity_is_the_formula(seed):
    subject, batch, truth = words()
    readout, start = Readout.of(subject, batch, targets(0, batch, labels=1))
    out, noise = removal.removal(subject, batch), torch.randn_like(truth)
    found = infidelity.infidelity(readout, out, noise, samples=5, seed=4)
    sets = infidelity._sets(readout, out, 5, 4)
    assert sets.any(2).all() and not sets[1, :, 7:].any()  # at least one unit, never one that the row does not have
    for row in (0, 1):
        own, weights = (units.pooled(one, out.groups)[row] for one in (noise, truth))
        lost, predicted = (sets[row].double() @ one for one in (weights, own))
        scale = max(0, float(predicted @ lost / (predicted @ predicted)))
        assert found[row] == pytest.approx(float((scale * predicted - lost).square().mean()))
    with pytest.raises(ValueError, match="at least 2"):
        infidelity.infidelity(readout, out, noise, samples=1)


def test_sensitivity_of_pixels_is_the_formula(seed):
    subject, batch, _ = patches()
    seen: list[torch.Tensor] = []

    def map_of(changed, own):
        assert torch.is_grad_enabled() and len(own.targets) == changed.rows
        seen.append(changed.args[0])
        return (changed.args[0] * subject.model.weights.detach())[:, 0]

    found = sensitivity.max_sensitivity(subject, batch, targets(0, batch, labels=1), map_of, samples=3, batch_size=4)
    inputs = torch.cat(seen[1:])[:, 0].view(2, 3, 8, 8) if len(seen[0]) == 2 else None
    weights, source = subject.model.weights.detach(), batch.args[0][:, 0]
    for row in (0, 1):
        steps = [(inputs[row, s] - source[row]) for s in range(3)]
        assert all(0 < step.abs().max() <= sensitivity.RADIUS * source[row].std() for step in steps)
        wanted = max(float((weights * step).norm() / (weights * source[row]).norm()) for step in steps)
        assert found[row] == pytest.approx(wanted)
    still = lambda changed, own: torch.ones(changed.rows, 8, 8)
    assert not sensitivity.max_sensitivity(subject, batch, targets(0, batch, labels=1), still, samples=2).any()


@pytest.mark.parametrize("build", [bert, gpt2])
def test_sensitivity_of_text_moves_the_embeddings_and_gives_them_back(seed, build):
    model = build()
    subject = Subject(model, modality="text")
    batch = text([CLS, 5, 6, 7, SEP], [CLS, 8, 8, SEP])
    batch.kwargs["attention_mask"] = (batch.kwargs["input_ids"] != 0).long()
    own = subject.targets(1, 2) if build is bert else targets(5, batch, labels=None)
    table = model.get_input_embeddings().weight
    before, seen = [table.clone(), model(**batch.kwargs).logits.clone()], []

    def map_of(changed, spec):
        vectors = model.get_input_embeddings()(changed.kwargs["input_ids"]).detach()
        seen.append(vectors)
        return vectors.sum(-1)

    found = sensitivity.max_sensitivity(subject, batch, own, map_of, samples=2)
    whole, moved = seen[0], seen[1].view(2, 2, *seen[0].shape[1:])
    torch.testing.assert_close(whole, table[batch.kwargs["input_ids"]].detach())
    special = (units.groups(batch) < 0)[:, None].expand(-1, 2, -1)
    steps = moved - whole[:, None]
    assert not steps[special].any() and (steps[~special].abs().amax(-1) > 0).all()
    assert not torch.equal(steps[1, :, 1], steps[1, :, 2])  # the same token twice moves two ways
    wanted = (moved.sum(-1) - whole.sum(-1)[:, None]).norm(dim=-1).amax(1) / whole.sum(-1).norm(dim=-1)
    torch.testing.assert_close(found, wanted)
    assert model.get_input_embeddings().weight is table and torch.equal(table, before[0])
    assert torch.equal(model(**batch.kwargs).logits, before[1])
    with pytest.raises(ZeroDivisionError):
        sensitivity.max_sensitivity(subject, batch, own, lambda *_: 1 / 0)
    assert model.get_input_embeddings().weight is table


def test_text_without_a_table_has_no_sensitivity(seed):
    class Shifted(nn.Module):
        def forward(self, input_ids, attention_mask):
            return input_ids.double().sum(1, keepdim=True)

    batch = text([CLS, 5, 6, SEP])
    with pytest.raises(ValueError, match="looks the token ids up in a table"):
        sensitivity.max_sensitivity(Subject(Shifted()), batch, targets(0, batch, labels=1), lambda *_: None)


# Sanity --------------------------------------------------------------------------------------------------------------


def deep():
    """A tiny BERT, a batch long enough for correlations to mean something, and how to explain it."""
    subject = Subject(bert(num_labels=2), modality="text")
    ids = torch.randint(4, 40, (3, 24))
    batch = subject.prepare({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return subject, batch, lambda: explain(subject, batch, 1, method="input-x-gradient").map


def test_stages_go_from_the_output_down_and_hold_every_parameter_once(seed):
    subject, batch, _ = deep()
    stages = sanity.stages(subject, batch)
    layers = [f"bert.encoder.layer.{i}" for i in (2, 1, 0)]
    assert [stage.name for stage in stages] == ["head", *layers, "embeddings"]
    names = [name for stage in stages for name in stage.parameters]
    assert sorted(names) == sorted(name for name, _ in subject.model.named_parameters())
    assert any("classifier" in name for name in stages[0].parameters)
    plain = Subject(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double())
    found = sanity.stages(plain, plain.prepare(torch.randn(2, 4)))
    assert [stage.name for stage in found] == ["2", "0"]


def test_randomised_weights_destroy_a_map_of_what_was_learned(seed):
    subject, batch, run = deep()
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    found = sanity.cascading(subject, batch, run(), run)
    assert found.shape == (5, 3) and found.isfinite().all()
    assert found[-1].abs().mean() < 0.35  # 24 tokens: chance is about 0.17
    alone = sanity.independent(subject, batch, run(), run)
    torch.testing.assert_close(alone[0], found[0])  # the head alone is the first of both
    assert not torch.equal(alone[-1], found[-1])
    assert all(torch.equal(before[name], value) for name, value in subject.model.state_dict().items())


def test_a_map_that_does_not_look_at_the_model_survives(seed):
    subject, batch, run = deep()
    fixed = torch.randn(3, 24)
    assert (sanity.cascading(subject, batch, fixed, lambda: fixed) > 1 - 1e-9).all()
    assert sanity.cascading(subject, batch, fixed, lambda: torch.zeros(3, 24)).isnan().all()
    with pytest.raises(Undefined):
        sanity.cascading(subject, batch, torch.zeros(3, 24), lambda: fixed)


def test_drawn_weights_keep_their_size_and_come_back_after_an_exception(seed):
    model = nn.Linear(50, 50).double()
    before = model.weight.clone()
    with pytest.raises(ZeroDivisionError), sanity.randomised(model, ["weight"], seed=1):
        assert not (model.weight == before).any()
        assert model.weight.std().item() == pytest.approx(before.std().item(), rel=0.1)
        raise ZeroDivisionError
    assert torch.equal(model.weight, before)
    with pytest.raises(ValueError, match="no parameter 'wait'"), sanity.randomised(model, ["wait"]):
        pass


def test_class_contrast_by_hand(seed):
    batch = text([CLS, 5, 6, 7, SEP])
    one, other = torch.tensor([[9.0, 3, 2, 1, 9]]), torch.tensor([[9.0, 1, 3, 2, 9]])
    assert sanity.class_contrast(one, other, batch).item() == pytest.approx(-0.5)  # special tokens are left out
    assert sanity.class_contrast(one, one, batch).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="do not compare"):
        sanity.class_contrast(one, other[:, 1:], batch)


# Controls ------------------------------------------------------------------------------------------------------------


def test_the_centre_prior_is_largest_in_the_middle():
    pictures = control.centre_prior(images(torch.rand(2, 1, 9, 9), 3))
    assert pictures.shape == (2, 9, 9) and pictures[0].argmax() == 4 * 9 + 4
    torch.testing.assert_close(pictures, pictures.flip(1).transpose(1, 2))
    lines = control.centre_prior(text([CLS, 5, 6, 7, SEP], [CLS, 5, SEP]))
    assert lines[0].argmax() == 2 and lines[0, [0, 4]].tolist() == [0, 0] and lines[1].tolist() == [0, 1, 0, 0, 0]
    torch.testing.assert_close(lines[0, 1], lines[0, 3])


def test_token_frequency_by_hand():
    batch = text([CLS, 5, 6, 5, SEP], [CLS, 5, 7, SEP])
    counts = control.counted([batch.units])
    assert counts == Counter({"5": 3, "6": 1, "7": 1})
    found = control.token_frequency(batch, counts)
    wanted = [0, torch.tensor(6 / 4).log(), torch.tensor(6 / 2).log(), torch.tensor(6 / 4).log(), 0]
    torch.testing.assert_close(found[0], torch.tensor(wanted))
    assert found[1, -2:].tolist() == [0, 0]
    with pytest.raises(ValueError, match="no text"):
        control.token_frequency(images(torch.rand(1, 1, 4, 4), 2), counts)


def test_toys_are_what_these_tests_take_them_for(seed):
    for make, kind in ((words, Words), (patches, Patches)):
        subject, batch, truth = make()
        assert isinstance(subject.model, kind) and rows.leaf(batch)[1].shape[0] == 2
        torch.testing.assert_close(subject.forward(batch)[:, 0], truth.flatten(1).sum(1))
