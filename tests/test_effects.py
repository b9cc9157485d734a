"""Effects: equal to plain runs with the mediator changed, whatever is not computed again, and to their identities."""
from __future__ import annotations

import itertools
from functools import cache, partial

import numpy
import pytest
import torch
from families import FAMILIES
from families import model as built
from scipy import stats
from torch import nn
from torch.testing import assert_close

import relprop
from relprop import mediation
from relprop.check import statistics
from relprop.errors import Undefined
from relprop.intervene import Given, Mean, Resample, Site, Zero, intervened, parts
from relprop.mediation import KL, Difference, LogOdds, Ratio, Value, experiment, mediators_of
from relprop.mediation.outcome import outcome
from relprop.mediation.statistic import benjamini_hochberg, intervals, numbered, sign_flip, summary
from relprop.result import Effects
from relprop.subject import Subject

effects = partial(mediation.effects, resamples=99)
GENERATIVE = ["gpt2", "gpt-neox", "opt", "bloom", "llama-eager", "mistral", "qwen3", "gemma2", "phi3"]


SOME = ["gpt2", "bert-eager", "timm-vit"]
CLOSE = dict(rtol=1e-6, atol=1e-10)  # float64, and parts in float32 that some models have


def model(name):
    return built(name, torch.float64)


@cache
def known(name):
    args, kwargs = FAMILIES[name].inputs(torch.float64)
    return parts(model(name), args, kwargs)


def subject(name):
    return Subject.from_module(model(name), task="feature-extraction" if name.startswith("t5") else None)


def two(name, *, first=2, rows=3):
    """A base and a counterfactual; texts differ from position `first` on."""
    args, kwargs = FAMILIES[name].inputs(torch.float64, rows=rows)
    if args:
        return args[0], args[0].flip(0) * 0.5
    ids = kwargs["input_ids"].clone()
    ids[:, first:] = torch.where(ids == 0, 0, (ids + 5) % 30 + 3)[:, first:]
    return kwargs, {**kwargs, "input_ids": ids}


def asked(name):
    """An outcome that goes with a family: two tokens behind the text, or a number of the output."""
    if subject(name).task == "text-generation":
        return LogOdds([5, 6], [7])
    return relprop.Function(FAMILIES[name].value)


def plainly(name, here, there, site, ask):
    """The outcome with one mediator taken from another run, by plain forwards."""
    one = subject(name)
    here, there = one.prepare(here), one.prepare(there)
    total = []
    for mine, other in outcome(ask).pairs(one, here, there):
        with torch.no_grad(), intervened(model(name), {site: Resample(other.batch)}, known=known(name)):
            output = one.forward(mine.batch)
        total.append(answered(mine, output))
    return outcome(ask).value(total)


def answered(question, output):
    """What a question's answer is of the whole output of a plain forward."""
    rows = torch.arange(question.batch.rows)
    if question.at is not None:
        output = output.logits[rows[:, None], question.at]
    return question.answer(output if question.tokens is None else output[..., question.tokens], rows).double()


@pytest.mark.parametrize("name", FAMILIES)
def test_effects_are_those_of_plain_runs(name):
    base, other = two(name)
    sites = ["L0.attn.H1", "L1.attn", "L1.attn.H1.pattern"]
    kinds = ["indirect", "direct"] if name in SOME else ["indirect"]
    found = effects(subject(name), base, other, asked(name), at=sites, kind=kinds, batch_size=12)
    assert found.mediators == tuple(sites) and (found.indirect.abs().amax(1) > 2e-9).all()
    for index, site in enumerate(sites):
        assert_close(found.indirect_outcome[index], plainly(name, base, other, site, asked(name)), **CLOSE)
        if name in SOME:
            assert_close(found.direct_outcome[index], plainly(name, other, base, site, asked(name)), **CLOSE)


@pytest.mark.parametrize("name", GENERATIVE)
@pytest.mark.parametrize("at", [["L0.attn.H1@-1", "L0@4", "L1.attn.H1.pattern@-1"], ["L0.mlp@2", "L1.attn.H0@-1"]])
def test_positions_before_the_change_come_from_the_cache(name, at):
    base, other = two(name, first=0)
    base, other = ({key: value[::2, :6] for key, value in one.items()} for one in (base, other))
    ask = relprop.Contrast(relprop.Token(5), relprop.Token(6))
    found = effects(model(name), base, other, ask, at=at, kind="indirect")
    assert found.indirect.abs().amax(1).min() > 1e-6
    for index, site in enumerate(at):
        assert_close(found.indirect_outcome[index], plainly(name, base, other, site, ask), **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "gemma3", "opt-post-norm"])
def test_what_saves_passes_is_in_use(name):
    """Else the tests above would say nothing of it."""
    base, other = two(name)
    one = subject(name)
    base, other = one.prepare(base), one.prepare(other)
    with torch.no_grad():
        spots = [spot for spots in mediators_of(one, base, "L1.attn.H*").values() for spot in spots]
        ask = outcome(LogOdds(5, 6))
        (first, second), = experiment(one, ask, ask.pairs(one, base, other), spots).stages
    assert first.offset == second.offset == 2 and first.narrow
    paths = [kept.call.path for kept in first.recording.before(first.recording.when[spots[0].tap])]
    layers = parts(model(name), base.args, base.kwargs).layers
    assert layers[0].path in paths and layers[1].path not in paths and len(paths) > 3


def others(name):
    """Models whose modules are called in other ways: layers that share a module, experts that see some tokens, a
    decoder that attends to an encoder.
    """
    import transformers as hf

    torch.manual_seed(0)
    small = dict(vocab_size=40, hidden_size=16, num_attention_heads=2, intermediate_size=24, max_position_embeddings=32)
    models = {
        "albert": lambda: hf.AlbertForSequenceClassification(hf.AlbertConfig(**small, num_hidden_layers=3, num_labels=3,
                                                                             embedding_size=8, initializer_range=0.3)),
        "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**small, num_hidden_layers=2, num_key_value_heads=1,
                                                                  num_local_experts=4, initializer_range=0.3,
                                                                  experts_implementation="eager")),
        "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24,
                                                                num_layers=2, num_heads=2, pad_token_id=0,
                                                                decoder_start_token_id=0))}
    return models[name]().double().eval()


@pytest.mark.parametrize("name, ask, at", [
    ("albert", 1, ["L0.attn.H1", "L2.attn.H0", "L1"]), ("mixtral", LogOdds(5, [6, 7]), ["L0.attn.H1", "L1.attn", "L0"]),
    ("t5", LogOdds(5, [6, 7]), ["L1.attn.H1", "L3.cross.H0", "L3.attn.H1", "L2.cross.H1.pattern"])])
def test_effects_where_modules_are_called_otherwise(name, ask, at):
    base, other = two("gpt2")
    subject = Subject.from_module(others(name))
    found = effects(subject, base, other, ask, at=at, kind="indirect")
    base, other = subject.prepare(base), subject.prepare(other)
    pairs = outcome(ask).pairs(subject, base, other)
    for index, site in enumerate(at):
        answers = []
        for mine, more in pairs:
            with torch.no_grad(), intervened(subject.model, {site: Resample(more.batch)}):
                output = subject.forward(mine.batch)
            rows = torch.arange(3)
            z = output if mine.at is None else output.logits[rows[:, None], mine.at]
            answers.append(mine.answer(z if mine.tokens is None else z[..., mine.tokens], rows))
        assert_close(found.indirect_outcome[index], outcome(ask).value(answers), **CLOSE)
        assert found.indirect[index].abs().max() > 1e-9, site


def test_positions_by_name_and_of_patches():
    base, other = two("gpt2")
    named = effects(model("gpt2"), base, other, Ratio(5, 6), at="L0.mlp@job", spans={"job": [[2], [2, 3], [3]]})
    each = [effects(model("gpt2"), base, other, Ratio(5, 6), at=f"L0.mlp@{place}").indirect[0, row]
            for row, place in enumerate(["2", "2,3", "3"])]
    assert_close(named.indirect[0], torch.stack(each))
    pixels, changed = two("hf-vit")
    patch = effects(model("hf-vit"), pixels, changed, 1, at=["L0@p3", "L0@4", "L0@cls"])
    assert torch.equal(patch.indirect[0], patch.indirect[1]) and not torch.equal(patch.indirect[0], patch.indirect[2])


def test_narrowing_is_left_out_where_positions_mix_behind_the_last_attention():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = FAMILIES["gpt2"].model().double()

        def forward(self, input_ids, attention_mask=None):
            hidden = self.inner.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
            return self.inner.lm_head(hidden.cumsum(1))

    one = Subject.from_module(Mixing().eval(), task="text-generation")
    base, other = two("gpt2")
    found = effects(one, base, other, LogOdds(5, 6), at="L*.attn.H*", kind="indirect")
    prepared = one.prepare(base)
    for index, site in enumerate(found.mediators):
        with torch.no_grad(), intervened(one.model, {site: Resample(one.prepare(other))}):
            z = one.forward(prepared)[torch.arange(3), prepared.last]
        assert_close(found.indirect_outcome[index], z[:, 5] - z[:, 6], **CLOSE)


def test_rows_that_are_others_inside_the_model_are_refused():
    """What stands at a place in the middle of a batch that is turned around is of another row."""
    class Turned(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.flip(0)).flip(0)

    one = FAMILIES["gpt2"].model().double()
    one.transformer.h[0].mlp = Turned(one.transformer.h[0].mlp)
    base, other = two("gpt2")
    with pytest.raises(ValueError, match="rows cannot be told apart at transformer.h.0.mlp.inner.c_proj"):
        effects(one, base, other, LogOdds(5, 6), at="L0.mlp")
    found = effects(one, base, other, LogOdds(5, 6), at=["L0", "L1.mlp"])
    assert_close(found.indirect, effects(model("gpt2"), base, other, LogOdds(5, 6), at=["L0", "L1.mlp"]).indirect)


# -- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["difference", "ratio"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "timm-vit"])
def test_a_mediator_that_carries_everything_and_one_that_carries_nothing(name, scale):
    base, other = two(name)
    ask = asked(name)
    found = effects(model(name), base, other, ask, scale=scale, kind=["total", "direct", "indirect"],
                    at={"all": "L1", "heads": "L*.attn.H*", "part": ["L0.attn.H0", "L0.mlp"]})
    assert_close(found.indirect[0], found.total, **CLOSE)
    assert found.direct[0].abs().max() < 1e-5 < found.total.abs().max()
    assert_close(found.total.expand(3, 3), found.direct + found.indirect + found.interaction)
    assert found.interaction[2].abs().max() > 1e-7  # is there, not assumed away
    if name == "gpt2":  # the output is read at the last position, which nothing of the last layer before it reaches
        none = effects(model(name), base, other, relprop.Token(5), at=["L1.mlp@0", "L1@1"], kind="indirect")
        assert none.indirect.abs().max() < 1e-12  # rounding: rows are run together


def test_total_is_direct_minus_the_indirect_effect_of_the_way_back():
    """TE(x to x') = NDE(x to x') - NIE(x' to x), always (Pearl 2001)."""
    base, other = two("llama")
    there = effects(model("llama"), base, other, LogOdds(5, 6), kind=["total", "direct"])
    back = effects(model("llama"), other, base, LogOdds(5, 6), kind="indirect")
    assert there.direct.abs().max() > 1e-4
    assert_close(there.total.expand_as(there.direct), there.direct - back.indirect, **CLOSE)


def test_controlled_effects():
    base, other = two("gpt2")
    found = effects(model("gpt2"), base, other, LogOdds(5, 6), at=["L1", "L0.attn.H0"], kind=["total", "controlled"],
                    fixed=Zero())
    assert not found.controlled[0].any() and found.controlled[1].abs().max() > 1e-4
    one = subject("gpt2")
    values = []
    for batch in (one.prepare(base), one.prepare(other)):
        with torch.no_grad(), intervened(model("gpt2"), {"L0.attn.H0": Zero()}):
            z = one.forward(batch).logits[torch.arange(3), batch.last]
        values.append(z[:, 5] - z[:, 6])
    assert_close(found.controlled[1], values[1] - values[0], **CLOSE)
    means = effects(model("gpt2"), base, other, LogOdds(5, 6), at="L0.attn.H0", kind="controlled", fixed=Mean(base))
    assert means.controlled.shape == (1, 3) and not torch.allclose(means.controlled, found.controlled[1:])
    given = effects(model("gpt2"), base, other, LogOdds(5, 6), at="L0.attn.H0", kind="controlled", fixed=Given(0.0))
    assert_close(given.controlled, found.controlled[1:])


def test_batches_and_pieces_change_nothing():
    base, other = two("llama")
    whole = effects(model("llama"), base, other, LogOdds(5, [6, 7]))
    small = effects(model("llama"), base, other, LogOdds(5, [6, 7]), batch_size=1)
    assert_close(small.indirect_outcome, whole.indirect_outcome, **CLOSE)
    alone = [effects(model("llama"), *({name: value[row:row + 1] for name, value in one.items()} for one in
                                       (base, other)), LogOdds(5, [6, 7])).indirect for row in range(3)]
    assert_close(torch.cat(alone, 1), whole.indirect, **CLOSE)


def test_memory_that_runs_out_halves_the_batch(monkeypatch):
    from relprop.mediation.stage import Stage

    base, other = two("gpt2")
    whole = effects(model("gpt2"), base, other, LogOdds(5, 6))
    answers, sizes = Stage.answers, []

    def short(self, copies, groups):
        if groups:
            sizes.append(copies)
        if copies > 1:
            raise torch.OutOfMemoryError("no more")
        return answers(self, copies, groups)

    monkeypatch.setattr(Stage, "answers", short)
    found = effects(model("gpt2"), base, other, LogOdds(5, 6))
    assert max(sizes) > 1
    assert_close(found.indirect, whole.indirect, **CLOSE)


def test_the_model_comes_back():
    one = FAMILIES["gpt2"].model().double().train()
    base, other = two("gpt2")
    before = [(name, type(module), len(module._forward_hooks), module.training) for name, module in one.named_modules()]
    effects(one, base, other, LogOdds(5, 6), at="L*.attn.H*@-1")
    with pytest.raises(ZeroDivisionError):
        effects(one, base, other, relprop.Function(lambda output: output.logits[:, 0, 0] / (1 // 0)))
    assert before == [(name, type(module), len(module._forward_hooks), module.training)
                      for name, module in one.named_modules()]
    assert all(parameter.requires_grad for parameter in one.parameters())


# -- outcomes --------------------------------------------------------------------------------------------------------


def chances(name, ids, added=()):
    """Probabilities behind a text with more tokens, (V,), by a plain run of the row alone."""
    row = torch.tensor([[*ids, *added]])
    with torch.no_grad():
        return model(name)(input_ids=row).logits[0, -1].double().softmax(0)


def test_outcomes_are_their_definitions():
    base, other = two("gpt2")
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(base["input_ids"], base["attention_mask"])]
    p = lambda ids, tokens: [chances("gpt2", ids, tokens[:i])[token] for i, token in enumerate(tokens)]
    a, b = [5, 6, 7], [8]
    mean = lambda ids, tokens: torch.stack(p(ids, tokens)).log().mean().exp()
    whole = lambda ids, tokens: torch.stack(p(ids, tokens)).prod()
    wanted = {Ratio(a, b): lambda ids: mean(ids, a) / mean(ids, b), Difference(a, b): lambda ids: mean(ids, a) -
              mean(ids, b), LogOdds(a, b, normalised=False): lambda ids: (whole(ids, a) / whole(ids, b)).log(),
              Value(relprop.Probability(8)): lambda ids: mean(ids, b)}
    for ask, number in wanted.items():
        found = effects(model("gpt2"), base, other, ask, kind="total", at="L0")
        assert_close(found.base, torch.stack([number(ids) for ids in rows]), **CLOSE)
        assert found.outcome and found.total.any()
    each = effects(model("gpt2"), base, other, Ratio([a, b, a], b), kind="total", at="L0")
    assert_close(each.base[1], torch.ones(()).double())


def test_kl_from_the_base_run():
    base, other = two("gpt2")
    found = effects(model("gpt2"), base, other, KL(), at=["L1", "L0.attn.H0"], kind=["total", "indirect"])
    rows = lambda one: [ids[mask.bool()].tolist() for ids, mask in zip(one["input_ids"], one["attention_mask"])]
    for row, (ids, more) in enumerate(zip(rows(base), rows(other))):
        p, q = chances("gpt2", ids), chances("gpt2", more)
        assert_close(found.total[row], (p * (p / q).log()).sum(), **CLOSE)
    assert found.base.abs().max() < 1e-12 and (found.indirect[1] > 0).all()
    assert effects(model("timm-vit"), *two("timm-vit"), KL(), at="L1").total.min() > 0


def test_classes():
    base, other = two("timm-vit")
    found = effects(model("timm-vit"), base, other, Ratio(1, 2), kind="total", at="L0")
    with torch.no_grad():
        p = model("timm-vit")(base).softmax(1)
    assert_close(found.base, p[:, 1] / p[:, 2])
    first = effects(model("timm-vit"), base, other, at="L0", kind="total")  # the prediction, that of the base
    with torch.no_grad():
        z, after = model("timm-vit")(base), model("timm-vit")(other)
    assert_close(first.counterfactual, after.gather(1, z.argmax(1, keepdim=True))[:, 0])


# -- statistics and results ------------------------------------------------------------------------------------------


def test_statistics_are_those_of_one_mediator_at_a_time(seed):
    values = torch.randn(5, 8, dtype=torch.float64) + torch.arange(5)[:, None] * 0.3
    low, high = intervals(values)
    p = sign_flip(values)
    for row in range(5):
        one = statistics.interval(values[row])
        assert abs(low[row] - one[0]) < 0.06 and abs(high[row] - one[1]) < 0.06
        assert abs(p[row] - statistics.paired_p_value(values[row], range(8))) < 1e-12
    assert sign_flip(torch.zeros(1, 4)) == 1
    many = torch.randn(3, 20, dtype=torch.float64) + 0.3
    for row, found in enumerate(sign_flip(many)):
        assert abs(found - statistics.paired_p_value(many[row], range(20))) < 0.02
    p = torch.cat([p, torch.rand(20, dtype=torch.float64), p])  # with ties
    numpy.testing.assert_allclose(benjamini_hochberg(p), stats.false_discovery_control(p.numpy()))


def test_statistics_of_groups_draw_and_flip_whole_groups(seed):
    """Examples of one group are not independent: four of them say little more than one."""
    groups = ["a", "a", "b", None, "c", "c", "a", None, "d", "d", "d", "e"]  # 7 groups: None is in none
    by_name = [place if one is None else one for place, one in enumerate(groups)]
    values = torch.randn(4, 12, dtype=torch.float64) + torch.tensor([0, 0.4, 0.8, 0])[:, None]
    values += torch.randn(7)[numbered(groups, 12)].double() * 0.5  # what a group has in common
    number = numbered(groups, 12)
    low, high = intervals(values, number)
    p = sign_flip(values, number)
    for row in range(4):
        one = statistics.grouped_interval(values[row], by_name)
        assert abs(low[row] - one[0]) < 0.06 and abs(high[row] - one[1]) < 0.06
        assert abs(p[row] - statistics.paired_p_value(values[row], by_name)) < 1e-12
        sums = torch.zeros(7, dtype=torch.float64).index_add_(0, number, values[row])
        ways = torch.tensor(list(itertools.product([1.0, -1.0], repeat=7)), dtype=torch.float64)
        assert abs(p[row] - ((ways @ sums).abs() >= sums.sum().abs() - 1e-12).double().mean()) < 1e-12
    alone = intervals(values), sign_flip(values)
    assert (high - low > alone[0][1] - alone[0][0]).all() and not torch.isclose(p, alone[1]).any()
    with pytest.raises(AssertionError):  # without the groups it is another interval
        assert_close(torch.stack([low, high]), torch.stack(alone[0]), rtol=0.02, atol=0)
    found = summary(values, groups=groups)
    assert torch.equal(found.p, p) and torch.equal(found.low, low)
    assert torch.equal(summary(values, groups=range(12)).p, alone[1])
    assert summary(values, groups=["a"] * 12).low is None  # one group has no spread
    many = torch.randn(2, 40, dtype=torch.float64) + 0.3
    pairs = [place // 2 for place in range(40)]
    for row, found in enumerate(sign_flip(many, numbered(pairs, 40))):  # 2^20 ways: at random
        assert abs(found - statistics.paired_p_value(many[row], pairs)) < 0.02


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_saved_and_opened(tmp_path, suffix):
    base, other = two("gpt2")
    found = effects(model("gpt2"), base, other, Ratio(5, 6), kind=["total", "direct", "indirect"], scale="ratio")
    again = Effects.open(found.save(tmp_path / f"found.{suffix}"))
    assert torch.equal(again.indirect, found.indirect) and again.mediators == found.mediators
    assert again.table().equals(found.table()) and again.summary() == found.summary()
    table = found.table()
    assert table.loc[("indirect", "L1.attn.H0"), "mean"] == float(found.indirect[2].mean())
    assert len(table) == 1 + 3 * 4 and (table["q"] >= table["p"] - 1e-12).all()
    assert "(ratio, 3 examples)" in found.summary()
    assert "3 examples in 2 groups" in effects(model("gpt2"), base, other, Ratio(5, 6), groups=[1, 2, 1]).summary()
    for groups in (torch.tensor([1, 2, 1]), numpy.array([1, 2, 1])):
        assert effects(model("gpt2"), base, other, Ratio(5, 6), groups=groups, kind="total").about["groups"] == 2
    assert found.top(1)[0] == found.mediators[found.indirect.mean(1).abs().argmax()]
    with pytest.raises(ValueError, match="cannot write"):
        found.save(tmp_path / "found.xlsx")
    with pytest.raises(ValueError, match="not a 'effects'|not a result"):
        Effects.from_dict({"format": "relprop", "version": 1, "kind": "curve"})


@pytest.mark.parametrize("options, error, said", [
    (dict(at="L9"), ValueError, "no layer 9"), (dict(kind="all"), ValueError, "kinds of effect"),
    (dict(scale="log"), ValueError, "on the scale"), (dict(kind="controlled"), ValueError, "fixed="),
    (dict(batch_size=0), ValueError, "batch_size is 0"), (dict(at=[]), ValueError, "no place in the model"),
    (dict(at="L0.attn.H0@6"), ValueError, "row 1 has 4 positions"),
    (dict(outcome=Ratio([], 5)), ValueError, "a continuation is"),
    (dict(outcome=Ratio([[5], [6]], 5)), ValueError, "2 candidates for 3 rows"),
    (dict(outcome=Ratio("a", 5)), ValueError, "without a tokenizer"),
    (dict(outcome=relprop.Function(lambda output: output.logits[:, 0, 0] * 0)), Undefined, "whatever is changed"),
    (dict(outcome=KL(), scale="ratio"), Undefined, "a ratio to it is undefined")])
def test_bad_input(options, error, said):
    base, other = two("gpt2")
    ask = options.pop("outcome", Ratio(5, 6))
    with pytest.raises(error, match=said):
        effects(model("gpt2"), base, other, ask, **options)


def test_bad_pairs():
    base, other = two("gpt2")
    with pytest.raises(ValueError, match="row 0: base and counterfactual are equal"):
        effects(model("gpt2"), base, base, Ratio(5, 6))
    short = {name: value[:, :5] for name, value in other.items()}
    with pytest.raises(ValueError, match=r"row 0: the base has 7 tokens, 33 \| .*; the counterfactual has 5 tokens, 33 "
                                         r"\| .* or give align="):
        effects(model("gpt2"), base, short, Ratio(5, 6))
    with pytest.raises(ValueError, match="3 bases and 2 counterfactuals"):
        effects(model("gpt2"), base, {name: value[:2] for name, value in other.items()}, Ratio(5, 6))


def test_a_probability_of_zero_is_no_ratio():
    one = FAMILIES["gpt2"].model()
    one.lm_head = nn.Linear(16, 40, bias=True)
    nn.init.constant_(one.lm_head.bias, 0.0)
    one.lm_head.bias.data[5] = float("-inf")
    base, other = two("gpt2")
    with pytest.raises(Undefined, match="probability zero"):
        effects(one.eval(), base, other, Ratio(6, 5))


def test_sites_can_be_given_as_such():
    base, other = two("gpt2")
    found = effects(model("gpt2"), base, other, Ratio(5, 6), at=[Site.parse("L0.mlp[3]"), "L0.mlp.N2@-1", "embed@2"])
    assert found.mediators == ("L0.mlp[3]", "L0.mlp.N2@-1", "embed@2") and found.indirect.all()
