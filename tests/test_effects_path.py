"""Path-specific effects: equal to two plain runs, and to the effects that they must be."""
from __future__ import annotations

import pytest
import torch
from test_effects import CLOSE, answered, asked, model, outcome, subject, two
from torch.testing import assert_close

from relprop.intervene import Given, Hold, Intervention, Resample, intervened
from relprop.mediation import LogOdds, effects, path_effects

QUICK = dict(resamples=9)
FAMILIES = ["gpt2", "llama", "bert-eager", "timm-vit"]


class Read(Intervention):
    """Changes nothing and keeps what is there."""

    def value(self, now, there):
        object.__setattr__(self, "seen", now[0].clone())
        return now


def plainly(name, sender, receiver, held, ask):
    """By two plain forwards; sites are held and read by name."""
    one = subject(name)
    base, other = (one.prepare(side) for side in two(name))
    total = []
    for mine, theirs in outcome(ask).pairs(one, base, other):
        seen = Read()
        changes = {sender: Resample(theirs.batch), **({receiver: seen} if receiver else {}),
                   **{site: Hold(mine.batch) for site in held}}
        with torch.no_grad(), intervened(one.model, changes):
            output = one.forward(mine.batch)
        if receiver:
            with torch.no_grad(), intervened(one.model, {receiver: Given(seen.seen)}):
                output = one.forward(mine.batch)
        total.append(answered(mine, output))
    return outcome(ask).value(total)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("sender, receiver, held", [
    ("L0.attn.H1", "L1.attn.H0", ["L0.mlp", "L1.attn.H1"]), ("L0.mlp", "L1.mlp", ["L1.attn.H*"]),
    ("L0.attn.H0", "L1", ["L0.mlp", "L1.attn.H*", "L1.mlp"]), ("L0.attn.H1", None, ["L0.mlp", "L1.attn.H*", "L1.mlp"])])
def test_paths_are_those_of_plain_runs(name, sender, receiver, held):
    ask = asked(name)
    found = path_effects(model(name), *two(name), ask, sender=sender, receiver=receiver, **QUICK)
    assert found.mediators == (f"{sender} -> {receiver or 'outcome'}",)
    assert found.indirect.abs().max() > 1e-7
    assert_close(found.indirect_outcome[0], plainly(name, sender, receiver, held, ask), **CLOSE)
    every = effects(model(name), *two(name), ask, at=sender, **QUICK)
    assert not torch.allclose(found.indirect, every.indirect, **CLOSE)  # another path than all


def test_all_paths_through_what_carries_all():
    base, other = two("gpt2")
    ask = LogOdds(5, [6, 7])
    senders = ["L0.attn.H0", "L0.mlp", "L0", "embed", "L1.mlp"]
    own = effects(model("gpt2"), base, other, ask, at=senders, **QUICK)
    found = path_effects(model("gpt2"), base, other, ask, sender=senders, receiver="L1", held=(), **QUICK)
    assert_close(found.indirect, own.indirect, **CLOSE)
    through = path_effects(model("gpt2"), base, other, ask, sender="embed", receiver=["L*.attn.H*", "L*.mlp"], held=(),
                           **QUICK)
    parts = effects(model("gpt2"), base, other, ask, at=["L*.attn.H*", "L*.mlp"], **QUICK)
    direct = [parts.mediators.index(name.split(" -> ")[1]) for name in through.mediators]
    assert_close(through.total, found.total)
    assert_close(through.indirect[:2], parts.indirect[direct][:2], **CLOSE)  # of L0: the whole input reaches them so
    assert found.indirect.abs().amax(1).min() > 1e-5


def test_there_is_no_path_back_or_around():
    base, other = two("gpt2")
    found = path_effects(model("gpt2"), base, other, LogOdds(5, 6), sender=["L1.attn.H0", "L1.mlp", "L0.attn.H0"],
                         receiver=["L0.attn.H1", "L0.mlp", "L1.attn.H0.pattern"], **QUICK)
    of = {name: found.indirect[number].abs().max() for number, name in enumerate(found.mediators)}
    assert of.pop("L0.attn.H0 -> L0.mlp") > 1e-6 and of.pop("L0.attn.H0 -> L1.attn.H0.pattern") > 1e-6
    assert max(of.values()) < 1e-12 and len(of) == 7
    held = path_effects(model("gpt2"), base, other, LogOdds(5, 6), sender="L0.attn.H0", receiver="L1.mlp",
                        held=["L0"], **QUICK)
    assert held.indirect.abs().max() < 1e-12  # all that could pass is held


def test_a_part_of_the_receiver_is_not_held_against_it():
    """What stands before a receiver in its own part: the heads before the whole attention, patterns before a head."""
    base, other = two("gpt2")
    ask = LogOdds(5, 6)
    options = dict(sender="L0.mlp", **QUICK)
    both = path_effects(model("gpt2"), base, other, ask, receiver=["L1.attn", "L1.mlp"], **options)
    assert_close(both.indirect_outcome[0], plainly("gpt2", "L0.mlp", "L1.attn", ["L1.mlp"], ask), **CLOSE)
    assert_close(both.indirect_outcome[1], plainly("gpt2", "L0.mlp", "L1.mlp", ["L1.attn.H*"], ask), **CLOSE)
    pattern = path_effects(model("gpt2"), base, other, ask, receiver="L1.attn.H1", held=["L*.attn.pattern"], **options)
    heads = path_effects(model("gpt2"), base, other, ask, receiver="L1.attn.H1", **options)
    assert_close(pattern.indirect, heads.indirect, **CLOSE)


def test_sets_positions_pieces_and_files(tmp_path):
    base, other = two("gpt2")
    ask = LogOdds(5, [6, 7])
    options = dict(sender={"heads": "L0.attn.H*", "last": "L0.mlp@-1"}, receiver=["L1.attn.H*@-1", "L1.mlp[3]"],
                   scale="ratio", prompt_only=True, **QUICK)
    found = path_effects(model("gpt2"), base, other, ask, **options)
    assert found.mediators[:2] == ("heads -> L1.attn.H0@-1", "heads -> L1.attn.H1@-1") and len(found.mediators) == 6
    small = path_effects(model("gpt2"), base, other, ask, batch_size=1, **options)
    assert_close(small.indirect, found.indirect, **CLOSE)
    keep = torch.tensor([True, False, True])
    assert_close(path_effects(model("gpt2"), base, other, ask, keep=keep, **options).indirect, found.indirect[:, keep],
                 **CLOSE)
    again = type(found).open(found.save(tmp_path / "found.json"))
    assert torch.equal(again.indirect, found.indirect) and "->" in found.summary()
    assert again.about["held"] == ["L*.attn.H*", "L*.mlp"]


@pytest.mark.parametrize("options, said", [(dict(sender="L9"), "no layer 9"), (dict(scale="log"), "on the scale"),
                                           (dict(receiver=[]), "no place in the model")])
def test_bad_input(options, said):
    options = {"sender": "L0.mlp", "receiver": "L1.mlp", **options}
    with pytest.raises(ValueError, match=said):
        path_effects(model("gpt2"), *two("gpt2"), LogOdds(5, 6), **options)
