"""Trained models whose mechanism is known: the heads found necessary are those that carry it, and where they look."""
from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from attention_only import AttentionOnly, loaded
from torch import Tensor
from torch.testing import assert_close

import relprop
from relprop.check.statistics import interval
from relprop.intervene import Intervention, Mean, intervened
from relprop.mediation import effects, path_effects
from relprop.trace import attention_patterns

QUICK = dict(resamples=200)


def examples(folder, name) -> dict[str, Tensor]:
    import numpy

    with numpy.load(folder / "models" / name / "examples.npz") as found:
        return {key: torch.tensor(value) for key, value in found.items()}


def losses(right, model, sites, **interventions) -> dict[str, tuple[float, float, float]]:
    """What the accuracy, of which `right` (B,) is each row's, loses by each site alone: mean and 95 % interval."""
    before, found = right(), {}
    for site in sites:
        with intervened(model, dict.fromkeys(site.split("+"), interventions["put"])):
            lost = before - right()
        found[site] = (float(lost.mean()), *interval(lost))
    return found


@dataclass(frozen=True, eq=False)
class Cut(Intervention):
    """An attention pattern without the weight that one position, (R,), has for a row of it, `of`; the others share it.
    """

    at: Tensor
    of: int

    def value(self, now: Tensor, there: Tensor | None) -> Tensor:  # (N, R, T, S)
        changed = now.clone()
        changed[:, torch.arange(now.shape[1]), self.of, self.at] = 0
        return changed / changed.sum(-1, keepdim=True)


# -- induction: a previous-token head, and heads that look behind the earlier occurrence -------------------------------

EARLIER, LATER = slice(9, 25), slice(34, 50)  # the two places of the same 16 tokens
FIRST, INDUCTION, IDLE = "L0.attn.H2", ["L1.attn.H1", "L1.attn.H2", "L1.attn.H3"], "L1.attn.H0"


@cache
def induction(folder):
    return loaded(folder / "models" / "tl-induction"), examples(folder, "tl-induction")


def test_induction_is_loaded(shared):
    model, found = induction(shared)
    with torch.no_grad():
        assert_close(model(found["tokens"][:50].long())[:, 34:49], found["logits_first50"], rtol=0, atol=1e-4)


def test_induction_heads_are_necessary(shared):
    """Mean ablation, position by position, with the accuracies that are known of this model."""
    model, found = induction(shared)
    tokens, others = found["tokens"][:200].long(), found["tokens"][600:1000].long()

    @torch.no_grad()
    def right():
        return (model(tokens)[:, 34:49].argmax(-1) == tokens[:, 35:50]).double().mean(1)

    heads = [f"L{layer}.attn.H{head}" for layer in (0, 1) for head in range(4)]
    lost = losses(right, model, [*heads, "+".join(INDUCTION)], put=Mean(others, per_position=True))
    assert float(right().mean()) > 0.89
    known = {FIRST: 0.885, IDLE: 0.001, "+".join(INDUCTION): 0.898, **dict(zip(INDUCTION, (0.121, 0.251, 0.206)))}
    for site, mean in known.items():
        assert lost[site][0] == pytest.approx(mean, abs=0.025), site
    assert all(low > 0.05 for mean, low, high in (lost[site] for site in [FIRST, *INDUCTION]))
    assert lost[IDLE][2] < 0.01
    assert max(lost, key=lambda site: lost[site][0] if "+" not in site else 0) == FIRST


@cache
def repeated(folder):
    """Sequences, and the same with other tokens in the earlier place, so that the later ones have none to follow; the
    outcome is the logit of the token that comes next against that of the other one in its place.
    """
    tokens = induction(folder)[1]["tokens"][:48].long()
    other, generator = tokens.clone(), torch.Generator().manual_seed(0)
    for row in other:
        free = torch.tensor(sorted(set(range(128)) - set(row.tolist())))
        row[EARLIER] = free[torch.randperm(len(free), generator=generator)[:16]]
    at = 39  # the next token stood at 15 in the earlier place
    asked = [relprop.Contrast(relprop.Token(int(a), position=at), relprop.Token(int(b), position=at))
             for a, b in zip(tokens[:, at + 1], other[:, 15])]
    return {"input_ids": tokens}, {"input_ids": other}, asked


def test_induction_heads_carry_the_effect(shared):
    model, _ = induction(shared)
    found = effects(model, *repeated(shared), at="L*.attn.H*", **QUICK)
    assert set(found.top(4)) == {FIRST, *INDUCTION} and found.top(1) == [FIRST]
    summary, share = found.summaries["indirect"], found.indirect.mean(1) / found.total.mean()
    for name, high, part in zip(found.mediators, summary.high.tolist(), share.tolist()):
        if name in (FIRST, *INDUCTION):
            assert high < -0.5 and part > 0.2, name
        else:
            assert abs(part) < 0.15, name
    assert share[found.mediators.index(IDLE)].abs() < 0.02


def test_induction_heads_read_the_previous_token_head(shared):
    """From it to each of them there is a path of its own, and to the idle head none."""
    model, _ = induction(shared)
    found = path_effects(model, *repeated(shared), sender=FIRST, receiver=[*INDUCTION, IDLE], **QUICK)
    share = found.indirect.mean(1) / found.total.mean()
    assert share[:3].min() > 0.15 and share[3].abs() < 0.05
    assert found.summaries["indirect"].high[:3].max() < -0.5


def test_induction_heads_look_where_they_should(shared):
    model, _ = induction(shared)
    with torch.no_grad():
        _, (first, second) = attention_patterns(model, (), repeated(shared)[0])
    before = first[:, :, EARLIER].diagonal(8, 2, 3).mean((0, 2))  # from t to t - 1, (H,)
    behind = second[:, :, 34:49].diagonal(10, 2, 3).mean((0, 2))  # from t to what follows its earlier occurrence
    assert before[2] > 0.8 and before[[0, 1, 3]].max() < 0.15
    assert behind[1:].min() > 0.4 and behind[0] < 0.15


def test_paths_of_attention_alone(seed):
    """There are no MLPs to hold, which only who names them is told."""
    model = AttentionOnly(9, 5, 2, 8, 2, 4)
    base, other = ({"input_ids": torch.tensor([ids])} for ids in ([1, 2, 3], [4, 2, 3]))
    ask = dict(outcome=lambda output: output[:, -1, 7], sender="L0.attn.H*", receiver="L1.attn.H*", **QUICK)
    found = path_effects(model, base, other, **ask)
    assert len(found.mediators) == 4 and found.indirect.abs().amax() > 1e-6
    with pytest.raises(ValueError, match="no mlp"):
        path_effects(model, base, other, held=["L*.attn.H*", "L*.mlp"], **ask)


# -- sorted list: the next larger element ------------------------------------------------------------------------------


@cache
def sorting(folder):
    tokens = examples(folder, "tl-sorted-list")["tokens"].long()
    return relprop.load(folder / "models" / "gpt2-sorted-list"), tokens


def test_both_heads_sort(shared):
    """Mean ablation: neither can be left out, the second one least."""
    subject, tokens = sorting(shared)
    some = tokens[:200]

    @torch.no_grad()
    def right():
        return (subject.model(input_ids=some).logits[:, 10:-1].argmax(-1) == some[:, 11:]).double().mean(1)

    lost = losses(right, subject.model, ["L0.attn.H0", "L0.attn.H1"], put=Mean({"input_ids": tokens[400:700]}))
    assert float(right().mean()) > 0.995
    assert 0.1 < lost["L0.attn.H0"][1] and lost["L0.attn.H0"][2] < 0.3 and lost["L0.attn.H1"][1] > 0.75


@pytest.mark.parametrize("step", [12, 14, 18])
def test_the_next_element_comes_from_the_next_larger_one(shared, step):
    """Without the attention to it, what comes next is lost; without that to the element after it, or to the smallest,
    it is not.
    """
    subject, tokens = sorting(shared)
    some = tokens[tokens[:, 11:].diff(dim=1).gt(0).all(1)][:200]  # no element twice
    place = lambda wanted: (some[:, :10] == wanted[:, None]).long().argmax(1)
    following = place(some[:, step + 1]), place(some[:, step + 2]), place(some[:, 11])

    @torch.no_grad()
    def right():
        return (subject.model(input_ids=some).logits[:, step].argmax(-1) == some[:, step + 1]).double()

    lost = [losses(right, subject.model, ["L0.attn.H*.pattern"], put=Cut(at, step))["L0.attn.H*.pattern"]
            for at in following]
    assert len(some) > 100 and float(right().mean()) > 0.98
    assert lost[0][1] > 0.95 and lost[1][2] < 0.03 and lost[2][2] < 0.03


# -- palindromes: each position and its mirror -------------------------------------------------------------------------

CHECKS = ("L0.attn.H0", "L1.attn.H0")  # compares, and tells


@cache
def palindromes(folder):
    return relprop.load(folder / "models" / "gpt2-palindrome"), examples(folder, "tl-palindrome")


def whole(tokens: Tensor) -> dict[str, Tensor]:
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def test_two_heads_tell_palindromes(shared):
    subject, found = palindromes(shared)
    tokens, labels = found["tokens"].long(), found["labels"].long()[:600]

    @torch.no_grad()
    def right():
        return (subject.model(**whole(tokens[:600])).logits.argmax(-1) == labels).double()

    heads = [f"L{layer}.attn.H{head}" for layer in (0, 1) for head in (0, 1)]
    lost = losses(right, subject.model, heads, put=Mean(whole(tokens[1000:1600]), per_position=True))
    assert float(right().mean()) > 0.99
    for head in heads:
        assert (lost[head][1] > 0.4) if head in CHECKS else (lost[head][2] < 0.05), head


@cache
def mirrored(folder, half):
    """Palindromes, and the same with one number of the first or of the second half changed, at `place`; outcome: the
    logit of a palindrome against that of none.
    """
    generator = torch.Generator().manual_seed(half)
    numbers = torch.randint(31, (48, 10), generator=generator)
    tokens = torch.cat([torch.full((48, 1), 31), numbers, numbers.flip(1), torch.full((48, 1), 32)], 1)
    place = torch.randint(1, 11, (48,), generator=generator)
    place = 21 - place if half else place
    other, row = tokens.clone(), torch.arange(48)
    other[row, place] = (other[row, place] + torch.randint(1, 31, (48,), generator=generator)) % 31
    return whole(tokens), whole(other), lambda output: output.logits[:, 1] - output.logits[:, 0], place


@pytest.mark.parametrize("half", [0, 1])
def test_what_does_not_match_passes_where_it_meets_its_mirror(shared, half):
    """Whichever of the two numbers is changed, the effect passes the first head at the later one of the two places, and
    the second head at the end.
    """
    subject, _ = palindromes(shared)
    base, other, outcome, place = mirrored(shared, half)
    spans = {"later": [[max(one, 21 - one)] for one in place.tolist()],
             "earlier": [[min(one, 21 - one)] for one in place.tolist()],
             "elsewhere": [[one for one in range(1, 21) if one not in (where, 21 - where)] for where in place.tolist()]}
    at = ["L*.attn.H*", *(f"{CHECKS[0]}@{name}" for name in spans), f"{CHECKS[1]}@-1"]
    found = effects(subject, base, other, outcome, at=at, spans=spans, **QUICK)
    share = dict(zip(found.mediators, (found.indirect.mean(1) / found.total.mean()).tolist()))
    first, second = CHECKS
    assert found.summaries["total"].high < -5
    assert share[first] > 0.9 and share[f"{first}@later"] > 0.9 and share[second] > 0.85
    assert abs(share[f"{first}@earlier"]) < 0.05 and abs(share[f"{first}@elsewhere"]) < 0.05
    assert share[f"{second}@-1"] == pytest.approx(share[second], abs=1e-3)
    assert max(abs(share[f"L{layer}.attn.H1"]) for layer in (0, 1)) < 0.15
