"""Effects of inputs that differ in their number of tokens: values come from the positions that stand for each other."""
from __future__ import annotations

from functools import partial

import pytest
import torch
from test_effects import CLOSE, answered, known, model, outcome, subject, two
from torch.testing import assert_close

import relprop
from relprop import mediation
from relprop.approximation import estimates
from relprop.intervene import Resample, Zero, intervened
from relprop.mediation import KL, LogOdds, mediators_of, path_effects, subset
from relprop.mediation.counterpart import counterpart, lists_of

effects = partial(mediation.effects, resamples=9)
TOKEN = relprop.Contrast(relprop.Token(5), relprop.Token(6))
LENGTHS = [[7, 4, 6], [5, 6, 6]]
LISTS = [[0, 1, -1, -1, 2, 3, 4], [0, 1, 4, 5], [0, 1, 2, 3, 4, 5]]  # a longer base, a longer counterfactual, the same


def inputs(seed=0):
    """A base and a counterfactual with rows of `LENGTHS`, padded on the right, that begin alike."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (2, 3, 7), generator=generator)
    ids[1, :, :2] = ids[0, :, :2]
    width = [max(lengths) for lengths in LENGTHS]
    sides = []
    for side, lengths in enumerate(LENGTHS):
        mask = torch.arange(width[side]) < torch.tensor(lengths)[:, None]
        sides.append({"input_ids": torch.where(mask, ids[side, :, :width[side]], 0), "attention_mask": mask.long()})
    return sides


def wide(lists, width):
    """Lists as a tensor over positions of the batch, here where padding is on the right."""
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in lists])


def added(lists, here, there, widths):
    """With what is behind the prompts, of these lengths: positions one after the other."""
    return torch.tensor([[*row, *range(m, m + widths[0] - n), *[-1] * 9][:widths[0]]
                         for row, n, m in zip(lists, here, there)]).clamp_max(widths[1] - 1)


def plainly(name, here, there, site, ask, lists, *, back=False, lengths=LENGTHS):
    """The outcome with one mediator taken from another run, by plain forwards."""
    one = subject(name)
    total = []
    for pair in outcome(ask).pairs(one, one.prepare(here), one.prepare(there)):
        mine, theirs = pair
        size = [question.batch.kwargs["input_ids"].shape[1] for question in pair]
        at = added(lists, *lengths, size)
        with torch.no_grad(), intervened(model(name), {site: Resample(theirs.batch, at)}, known=known(name)):
            total.append(answered(mine, one.forward(mine.batch)))
    return outcome(ask).value(total)


def backward(lists, lengths):
    return [[row.index(at) if at in row else -1 for at in range(length)] for row, length in zip(lists, lengths)]


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert-masked-lm", "gpt-neox"])
@pytest.mark.parametrize("ask", [TOKEN, LogOdds([5, 6], 7)], ids=["token", "continuations"])
def test_values_come_from_the_counterparts(name, ask):
    if name == "bert-masked-lm":
        ask = relprop.Function(lambda output: output.logits[:, 0, 5])
    base, other = inputs()
    sites = ["L0.attn.H1", "L1.attn", "L0.mlp[3]", "embed", "L0.in"]
    found = effects(subject(name), base, other, ask, at=sites, kind=["total", "direct", "indirect"], align=LISTS)
    assert found.indirect.abs().amax(1).min() > 1e-7 and found.direct.abs().amax(1).min() > 1e-7
    back = backward(LISTS, LENGTHS[1])
    for index, site in enumerate(sites):
        assert_close(found.indirect_outcome[index], plainly(name, base, other, site, ask, LISTS), **CLOSE)
        assert_close(found.direct_outcome[index], plainly(name, other, base, site, ask, back, lengths=LENGTHS[::-1]),
                     **CLOSE)
    tensor = effects(subject(name), base, other, ask, at=sites, align=wide(LISTS, 7))
    assert torch.equal(tensor.indirect, found.indirect)
    shifted = effects(subject(name), base, other, ask, at=sites, align=[[0, 1, 2, 3, 4, -1, -1], *LISTS[1:]])
    assert not torch.allclose(shifted.indirect[:, 0], found.indirect[:, 0], **CLOSE)
    assert_close(shifted.indirect[:, 1:], found.indirect[:, 1:], **CLOSE)


def test_an_encoder_is_aligned_and_its_decoder_is_not():
    from test_effects import others

    one = relprop.Subject.from_module(others("t5"))
    base, other = inputs()
    sites = ["L0.attn.H1", "L1.mlp", "L3.attn.H1", "L2.cross.H0", "L1"]
    found = effects(one, base, other, LogOdds(5, [6, 7]), at=sites, kind=["total", "indirect", "direct"], align=LISTS)
    pairs = outcome(LogOdds(5, [6, 7])).pairs(one, one.prepare(base), one.prepare(other))
    for index, site in enumerate(sites):
        align = wide(LISTS, 7) if index in (0, 1, 4) else None
        answers = []
        for mine, theirs in pairs:
            with torch.no_grad(), intervened(one.model, {site: Resample(theirs.batch, align)}):
                output = one.forward(mine.batch).logits[torch.arange(3)[:, None], mine.at]
            answers.append(mine.answer(output, torch.arange(3)))
        assert_close(found.indirect_outcome[index], outcome(LogOdds(5, 6)).value(answers), **CLOSE)
    assert found.indirect.abs().amax(1).min() > 1e-9
    with pytest.raises(ValueError, match="attribution does not estimate effects of aligned inputs in an encoder with"):
        effects(one, base, other, LogOdds(5, 6), at="L0.mlp", align=LISTS, estimate="attribution")
    with pytest.raises(ValueError, match="encoder and decoder have as many positions"):
        ids = {**base, "decoder_input_ids": torch.zeros(3, 7).long()}
        effects(one, ids, {**base, "input_ids": base["input_ids"].roll(1, 1), "attention_mask":
                           torch.ones(3, 7).long()}, 5, align=[[-1] * 7, [-1] * 4, [-1] * 6], at="L0")


@pytest.mark.parametrize("scale", ["difference", "ratio"])
def test_identities(scale):
    base, other = inputs()
    ask = LogOdds([5, 6], 7)
    run = partial(effects, model("gpt2"), base, other, ask, scale=scale, kind=["total", "direct", "indirect"])
    found = run(at={"all": "L1", "some": ["L0.attn.H0", "L0.mlp"]}, align=LISTS)
    assert_close(found.indirect[0], found.total, **CLOSE)  # where the outcome is read has its counterpart
    assert_close(found.direct[0], torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)
    assert_close(found.total.expand(2, 3), found.direct + found.indirect + found.interaction)
    assert found.interaction[1].abs().max() > 1e-6
    none = [[-1] * 7, [-1] * 4, [-1] * 6]
    assert run(at="L*.attn.H*", align=none, prompt_only=True).indirect.abs().max() < 1e-12
    assert run(at="L*.attn.H*", align=none).indirect.abs().max() > 1e-4  # what is behind the prompts is the same
    if scale == "difference":  # TE(x to x') = NDE(x to x') - NIE(x' to x), always (Pearl 2001)
        back = effects(model("gpt2"), other, base, ask, at=["L0.attn.H0", "L0.mlp"],
                       align=backward(LISTS, LENGTHS[1]))
        there = run(at=["L0.attn.H0", "L0.mlp"], align=LISTS)
        assert_close(there.total.expand(2, 3), there.direct - back.indirect, **CLOSE)


def test_the_same_positions_are_no_alignment():
    base, other = two("gpt2")
    plain = effects(model("gpt2"), base, other, LogOdds(5, 6), kind=["indirect", "direct"])
    same = [list(range(int(count))) for count in base["attention_mask"].sum(1)]
    for align in (same, wide(same, 7), torch.arange(7)):
        if align is not same and align.dim() == 1:
            align = torch.where(base["attention_mask"].bool(), align, -1)
        again = effects(model("gpt2"), base, other, LogOdds(5, 6), kind=["indirect", "direct"], align=align)
        assert torch.equal(again.indirect, plain.indirect) and torch.equal(again.direct, plain.direct)
    one = subject("gpt2")
    prepared = [one.prepare(side) for side in (base, other)]
    assert lists_of(same, *prepared) is None
    turned = [[row[-1 - at] for at in range(len(row))] for row in same]  # of one length, and not the same
    found = effects(model("gpt2"), base, other, LogOdds(5, 6), kind="indirect", align=turned)
    assert not torch.allclose(found.indirect, plain.indirect, **CLOSE)


def test_positions_are_those_of_the_base():
    base, other = inputs()
    ask = TOKEN
    spans = {"job": [[2, 3], [2], [3]]}
    sites = ["L0.mlp@-1", "L0@2", "L0.attn.H0@job", "L1.attn.H1@1"]
    found = effects(model("gpt2"), base, other, ask, at=sites, kind=["indirect", "direct"], align=LISTS, spans=spans)
    places = [[[6], [3], [5]], [[2], [2], [2]], spans["job"], [[1], [1], [1]]]
    for index, site in enumerate(sites):
        some = [[at if place in places[index][row] else -1 for place, at in enumerate(one)] for row, one in
                enumerate(LISTS)]
        whole = site.split("@")[0]
        assert_close(found.indirect_outcome[index], plainly("gpt2", base, other, whole, ask, some), **CLOSE)
        back = backward(some, LENGTHS[1])
        assert_close(found.direct_outcome[index], plainly("gpt2", other, base, whole, ask, back,
                                                          lengths=LENGTHS[::-1]), **CLOSE)
    assert found.indirect[1, 0].abs() < 1e-12 < found.indirect[1, 1].abs()  # position 2 of row 0 stands for nothing
    one = subject("gpt2")  # and what comes before the change is not run again
    prepared = [one.prepare(side) for side in (base, other)]
    with torch.no_grad():
        spots = [spot for spots in mediators_of(one, prepared[0], "L0.mlp@-1").values() for spot in spots]
        made = mediation.experiment(one, outcome(ask), outcome(ask).pairs(one, *prepared), spots,
                                    align=lists_of(LISTS, *prepared))
    assert made.stages[0][0].offset == 3 and made.stages[0][1].offset == 0


def test_prompts_alone_and_controlled_effects():
    base, other = inputs()
    ask = LogOdds([5, 6, 8], 7)
    run = partial(effects, model("gpt2"), base, other, ask, at=["L0.attn.H0", "L0.mlp"], align=LISTS)
    assert not torch.allclose(run(prompt_only=True).indirect, run().indirect, **CLOSE)
    found = effects(model("gpt2"), base, other, TOKEN, at="L0.mlp@1", kind="controlled", fixed=Zero(), align=LISTS)
    one, values = subject("gpt2"), []
    for batch in map(one.prepare, (base, other)):  # position 1 stands for position 1
        with torch.no_grad(), intervened(one.model, {"L0.mlp@1": Zero()}):
            z = one.forward(batch).logits[torch.arange(3), batch.last]
        values.append(z[:, 5] - z[:, 6])
    assert_close(found.controlled[0], values[1] - values[0], **CLOSE)


@pytest.mark.parametrize("ask", [None, KL(), relprop.Probability(relprop.Token(5))], ids=["prediction", "KL", "chance"])
def test_outcomes_are_read_where_each_input_answers(ask):
    base, other = inputs()
    found = effects(model("gpt2"), base, other, ask, at="L1", align=LISTS)
    with torch.no_grad():
        z, changed = (one[torch.arange(3), torch.tensor(lengths) - 1] for one, lengths in
                      zip((model("gpt2")(**side).logits for side in (base, other)), LENGTHS))
    p, q = z.log_softmax(1), changed.log_softmax(1)
    best = z.argmax(1, keepdim=True)
    wanted = changed.gather(1, best)[:, 0] if ask is None else (p.exp() * (p - q)).sum(1) if isinstance(ask, KL) \
        else q[:, 5].exp()
    assert_close(found.counterfactual, wanted, **CLOSE)
    assert_close(found.indirect[0], found.total, **CLOSE)


def test_paths_and_subsets_take_counterparts_too():
    base, other = inputs()
    ask = TOKEN
    own = effects(model("gpt2"), base, other, ask, at=["L0.attn.H0", "embed"], align=LISTS)
    paths = path_effects(model("gpt2"), base, other, ask, sender=["L0.attn.H0", "embed"], receiver="L1", held=(),
                         align=LISTS, resamples=9)
    assert_close(paths.indirect, own.indirect, **CLOSE)
    patterns = path_effects(model("gpt2"), base, other, ask, sender="embed", receiver="L1.attn.H0.pattern",
                            align=LISTS, resamples=9)
    assert patterns.indirect.abs().max() > 1e-7
    few = subset(model("gpt2"), base, other, ask, k=2, align=LISTS)
    sets = effects(model("gpt2"), base, other, ask, at={str(k): list(few.chosen[:k]) for k in (1, 2)}, align=LISTS)
    assert_close(few.effects, sets.indirect, **CLOSE)


@pytest.mark.parametrize("method", ["attribution", "integrated-gradients"])
def test_estimates_take_counterparts_too(method):
    base, other = inputs()
    found = effects(model("gpt2"), base, other, TOKEN, at="L*.mlp.N*", align=LISTS, estimate=method, verify=5)
    wanted = estimates(subject("gpt2"), base, other, TOKEN, at="L*.mlp.N*", method=method, align=wide(LISTS, 7))
    told = found.about["estimate"]["mean"]
    assert_close(torch.tensor([told[name] for name in wanted.addresses]), wanted.values.double().mean(0).float(),
                 rtol=1e-5, atol=1e-9)
    exact = effects(model("gpt2"), base, other, TOKEN, at=list(found.mediators), align=LISTS)
    assert_close(found.indirect, exact.indirect, **CLOSE)
    several = effects(model("gpt2"), base, other, LogOdds([5, 6], 7), at="L*.mlp.N*", align=LISTS, estimate=method,
                      verify=48)
    assert several.about["estimate"]["pearson"] > 0.9


def test_positions_of_what_is_asked_behind_the_prompt():
    one = subject("gpt2")
    base, other = (one.prepare(side) for side in inputs())
    (mine, theirs), *_ = outcome(LogOdds([5, 6, 8], 7)).pairs(one, base, other)
    found = counterpart(mine, theirs, LISTS)
    assert found.at.tolist() == [[0, 1, -1, -1, 2, 3, 4, 5, 6], [0, 1, 4, 5, 6, 7, -1, -1, -1],
                                 [0, 1, 2, 3, 4, 5, 6, 7, -1]]
    assert found.back().back().at.tolist() == found.at.tolist()


@pytest.mark.parametrize("options, said", [
    (dict(align=None), r"the base has 7 tokens, 24 .*; the counterfactual has 5 tokens, .* or give align="),
    (dict(align="slots"), "align='slots' is of pairs, whose slots are known"),
    (dict(align=[[0, 1]] * 3), "the alignment has 2 positions"), (dict(align=LISTS[:2]), "alignments of 2 pairs"),
    (dict(align=[[0, 1, 2, 3, 4, 5, 9], *LISTS[1:]]), "5 among them"),
    (dict(align=torch.zeros(3, 4).long()), r"align= of shape \(3, 4\) for a base of \(3, 7\)"),
    (dict(align=wide([[0, 1, 2, 3, 4, 5, 5], *LISTS[1:]], 7)), "align= has 5 for position 5, where the counterfactual"),
    (dict(align=LISTS, at="L0.attn.H0.pattern"), "L0.attn.H0.pattern: attention patterns of inputs of"),
    (dict(align=[[0, 0, 0, 0, 2, 3, 4], *LISTS[1:]], kind="direct"), "puts two positions of base 0 at position 0"),
    (dict(groups=["a"], align=LISTS), "1 groups for 3 pairs"), (dict(align=LISTS, at="L0@5"), "row 1 has 4 positions")])
def test_bad_alignments(options, said):
    with pytest.raises(ValueError, match=said):
        effects(model("gpt2"), *inputs(), TOKEN, **{"at": "L0.mlp", **options})


def test_pictures_have_no_tokens_to_align():
    with pytest.raises(ValueError, match="align= says which token stands for which, and these inputs are no texts"):
        effects(model("timm-vit"), *two("timm-vit"), 1, align=torch.arange(17))


def test_pairs_bring_what_is_known_of_them():
    from test_pairs import made, reader

    one = reader()
    pairs = made("nurse", "cook", "footballer")
    assert len({pair.group for pair in pairs.pairs}) == 3 and len(pairs) == 6
    found = effects(one, pairs, at=["L0.attn.H*", "embed@job"], kind=["total", "indirect"], align="slots")
    ready = relprop.data.matched(one, pairs, align="slots")
    wanted = effects(one, ready.base, ready.counterfactual, LogOdds(*ready.continuations), align=ready.align,
                     at=["L0.attn.H*", "embed@job"], spans=ready.spans, groups=ready.groups)
    assert torch.equal(found.indirect, wanted.indirect) and found.indirect.abs().amax(1).min() > 1e-7
    assert found.about["groups"] == 3 and torch.equal(found.summaries["indirect"].p, wanted.summaries["indirect"].p)
    alone = effects(one, pairs, at=["L0.attn.H*", "embed@job"], align="slots", groups=[None] * 6)
    assert torch.equal(alone.indirect, found.indirect)
    assert not torch.equal(alone.summaries["indirect"].p, found.summaries["indirect"].p)
    keep = torch.tensor([True, True, True, False, False, False])
    assert effects(one, pairs, at="L0.mlp", align="slots", keep=keep).about["groups"] == 2
    assert torch.equal(effects(one, ready, at="L0.mlp").indirect,
                       effects(one, pairs, at="L0.mlp", align="slots").indirect)
    with pytest.raises(ValueError, match="the base has 4 tokens, The .*; they are not as many"):
        effects(one, pairs)
    with pytest.raises(ValueError, match="pairs have their counterfactuals themselves"):
        effects(one, pairs, pairs)
    with pytest.raises(ValueError, match="effects are of a base and a counterfactual; give both, or"):
        effects(one, "The nurse said that")
    three = relprop.data.Pairs("three", "text", [relprop.data.Pair("The nurse", "The cook", (" he", " she", " it"))])
    with pytest.raises(ValueError, match="pairs with 3 continuations"):
        effects(one, three)
    several = relprop.data.Pairs("one", "text", [relprop.data.Pair("The nurse", "The cook", (" footballer",))])
    with pytest.raises(ValueError, match=r"tokens, \[.*\], where one is needed"):
        effects(one, several)
