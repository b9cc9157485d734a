"""The command `relprop mediate`: the effects of the library, in its files, and one line for each slip."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import gpt2
from typer.testing import CliRunner

import relprop
from relprop import cli, data
from relprop.errors import Undefined
from relprop.mediation import LogOdds, Subset, Subsets, Value, path_effects, subset, subsets, tracing
from relprop.result.number import amount
from relprop.target import Probability, Token

BASE, OTHER = "A wonderful film.", "A terrible film."
REVIEW = ["--base", BASE, "--counterfactual", OTHER]


def run(*arguments):
    return CliRunner().invoke(cli.app, ["mediate", *map(str, arguments)], prog_name="relprop")


def good(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """Folder of a tiny GPT-2 whose tokens are words, and a file of pairs for it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("stories")
    words = "[PAD] [CLS] [SEP] The nurse man woman baker said that he she un known".split()
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[SEP]"))
    tokenizer.pre_tokenizer = Whitespace()
    gpt2().save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[SEP]").save_pretrained(folder)
    lines = [{"base": f"The {one} said that", "counterfactual": f"The {other} said that",
              "continuations": [" he", " she"], "spans": {"who": [[4, 4 + len(one)]]},
              "counterfactual_spans": {"who": [[4, 4 + len(other)]]}}
             for one, other in [("nurse", "man"), ("baker", "woman"), ("nurse", "un known man")]]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_it_says_what_the_library_finds(stories, tmp_path):
    asked = ["-m", stories, "--data", stories / "pairs.jsonl", "--at", "L*.attn.H*", "--at", "L1.mlp@who"]
    result = good(*asked, "-o", tmp_path / "found.json")
    assert "1 of 3 pairs are left out" in result.stderr and "log P(' he') - log P(' she')" in result.stdout
    found = relprop.Effects.open(tmp_path / "found.json")
    subject = relprop.load(str(stories))
    pairs = data.matched(subject, data.pairs(stories / "pairs.jsonl").take([0, 1]))
    expected = relprop.effects(subject, pairs.base, pairs.counterfactual, LogOdds(*pairs.continuations),
                               at=["L*.attn.H*", "L1.mlp@1"], kind=["total", "direct", "indirect"])
    assert found.mediators[-1] == "L1.mlp@who" and found.mediators[:-1] == expected.mediators[:-1]
    for kind in ("total", "direct", "indirect", "interaction"):
        assert found.effect(kind).equal(expected.effect(kind)) and found.effect(kind).abs().max() > 1e-6
    assert found.about["data"] == data.pairs(stories / "pairs.jsonl").name
    printed = json.loads(good(*asked, "--json").stdout)
    assert printed["mediators"] == list(found.mediators)


def test_sides_of_unlike_length_are_aligned(stories, tmp_path):
    asked = ["-m", stories, "--data", stories / "pairs.jsonl", "--align", "slots"]
    good(*asked, "--at", "L*.attn.H*", "--at", "L1.mlp@who", "-o", tmp_path / "found.json")
    found, subject = relprop.Effects.open(tmp_path / "found.json"), relprop.load(str(stories))
    expected = relprop.effects(subject, data.pairs(stories / "pairs.jsonl"), align="slots",
                               at=["L*.attn.H*", "L1.mlp@who"], kind=["total", "direct", "indirect"])
    assert found.indirect.shape == (5, 3) and found.indirect.equal(expected.indirect)
    assert found.summaries["indirect"].p.equal(expected.summaries["indirect"].p)
    longer = ["--base", BASE, "--counterfactual", "A truly bad film."]  # the words that differ are a part of their own
    given = json.loads(good(*longer, "--align", "slots", "--at", "embed@changed", "--at", "embed@0", "--json").stdout)
    assert given["mediators"] == ["embed@changed", "embed@0"]
    (changed,), (same,) = ([y - given["base"][0] for y in one] for one in given["indirect_outcome"])
    assert abs(changed) > 1e-2 > 1e-4 > abs(same)


def test_paths(stories, tmp_path):
    asked = ["-m", stories, "--data", stories / "pairs.jsonl", "--at", "L0.attn.H*", "--at", "L0.mlp"]
    found = json.loads(good(*asked, "--receiver", "L1.mlp", "--receiver", "L1.attn.H0", "--json").stdout)
    subject, pairs = relprop.load(str(stories)), data.pairs(stories / "pairs.jsonl").take([0, 1])
    expected = path_effects(subject, pairs, sender=["L0.attn.H*", "L0.mlp"], receiver=["L1.mlp", "L1.attn.H0"])
    assert found["mediators"] == list(expected.mediators) and len(found["mediators"]) == 6
    assert found["indirect_outcome"] == expected.indirect_outcome.tolist()
    every = json.loads(good(*asked, "--receiver", "L1", "--held", "none", "--json", "--resume", tmp_path / "a").stdout)
    own = json.loads(good(*asked, "--kind", "indirect", "--json").stdout)
    assert torch.tensor(every["indirect_outcome"]).allclose(torch.tensor(own["indirect_outcome"]))
    assert any((tmp_path / "a").iterdir())
    end = json.loads(good(*asked, "--receiver", "outcome", "--json").stdout)
    assert end["mediators"][0] == "L0.attn.H0 -> outcome"


def test_controlled_effects():
    asked = [*REVIEW, "--outcome", "POSITIVE", "--at", "L0.attn.H0", "--at", "L3", "--json"]
    found = {said: json.loads(good(*asked, "--fixed", said).stdout) for said in ("zero", "mean", "0.0")}
    assert all(one["summaries"].keys() >= {"total", "direct", "indirect", "controlled"} for one in found.values())
    outcomes = {said: torch.tensor(one["controlled_outcome"]) for said, one in found.items()}
    assert outcomes["zero"].equal(outcomes["0.0"]) and not outcomes["zero"].equal(outcomes["mean"])
    (held,) = outcomes["zero"][:, -1].diff(dim=0)
    assert held.abs().max() < 1e-6  # all that differs has to pass the last layer


def test_a_folder_holds_every_kind_of_file(tmp_path):
    said = good(*REVIEW, "--outcome", "POSITIVE", "-o", tmp_path / "all").stdout
    files = {path.name for path in (tmp_path / "all").iterdir()}
    assert files == {"effects.html", "effects.png", "effects.svg", "effects.json", "effects.csv"}
    assert all(name in said for name in files) and "POSITIVE: total effect" in said
    assert "wonderful" in (tmp_path / "all" / "effects.html").read_text()


def test_a_star_is_each_position():
    found = json.loads(good(*REVIEW, "--outcome", "POSITIVE", "--at", "L1@*", "--kind", "indirect", "--json").stdout)
    assert found["mediators"] == [f"L1@{at}" for at in range(6)] and found["direct_outcome"] is None
    masked = "--data", "digits-mask", "--count", 1
    patches = json.loads(good(*masked, "--at", "L5@*", "--kind", "indirect", "--json").stdout)
    assert patches["mediators"] == ["L5@cls", *(f"L5@p{patch}" for patch in range(81))]
    base, changed, outcome = (patches[name] for name in ("base", "counterfactual", "indirect_outcome"))
    assert outcome[0] == pytest.approx(changed) and outcome[-1] == pytest.approx(base) and changed[0] < base[0] - 1


def test_outcomes():
    labels = good(*REVIEW, "--continuation", "POSITIVE", "--continuation", "NEGATIVE", "--kind", "total").stdout
    assert "log P('POSITIVE') - log P('NEGATIVE'): total effect -" in labels
    assert "KL from the base run: total effect" in good(*REVIEW, "--outcome", "kl", "--kind", "total").stdout
    assert "P('POSITIVE') / P('NEGATIVE')" in good(*REVIEW, "--continuation", "POSITIVE", "--continuation", "NEGATIVE",
                                                   "--outcome", "ratio", "--scale", "ratio", "--kind", "total").stdout


def test_neurons_by_an_estimate_and_a_sweep_that_goes_on(tmp_path):
    asked = [*REVIEW, "--outcome", "POSITIVE", "--at", "L3.mlp.N*", "--kind", "indirect"]
    good(*asked, "--estimate", "attribution", "--verify", 5, "-o", tmp_path / "few.json")
    few = relprop.Effects.open(tmp_path / "few.json")
    assert len(few.mediators) == 5 and few.about["estimate"]["verified"] == 5
    few.save(tmp_path / "few.html")
    page = (tmp_path / "few.html").read_text()
    assert "estimate method attribution" in page and "estimate spearman" in page and "estimate mean" not in page
    first, again = (good(*asked, "--resume", tmp_path / "sweep", "--json").stdout for _ in range(2))
    assert first == again and any((tmp_path / "sweep").iterdir())


def test_a_subset_is_the_librarys(tmp_path):
    asked = [*REVIEW, "--outcome", "POSITIVE", "--subset", 2]
    printed = good(*asked, "-o", tmp_path / "few", "--resume", tmp_path / "steps").stdout
    assert {path.name for path in (tmp_path / "few").iterdir()} == {f"subset.{one}" for one in cli.mediation.WRITTEN}
    found = Subset.open(tmp_path / "few" / "subset.json")
    expected = subset("reviews-bert", BASE, OTHER, "POSITIVE", k=2)
    assert found.chosen == expected.chosen and found.effects.equal(expected.effects) and found.about["data"] == "texts"
    assert f"2: + {found.chosen[1]}: together" in printed and (tmp_path / "steps" / "config.json").is_file()
    good(*asked, "--each-layer", "-o", tmp_path / "layers.json")
    several, layers = Subsets.open(tmp_path / "layers.json"), subsets("reviews-bert", BASE, OTHER, "POSITIVE", k=2)
    assert list(several) == ["", "L0", "L1", "L2", "L3"] and several[""].effects.equal(found.effects)
    assert all(several[name].effects.equal(one.effects) for name, one in layers.items())


def test_pairs_tell_their_words():
    bias = relprop.effects("tasks-gpt2", data.pairs("gender-bias", count=6), at="L0.attn.H0", resamples=99)
    assert bias.outcome == "log P(a) - log P(b)" and bias.about["a, b"] == "' he', ' she'; or ' she', ' he'"
    person = data.pairs("planted-professions", count=3)
    alike = relprop.effects("tasks-gpt2", person, at="L0.attn.H0", resamples=99)
    assert alike.outcome == "log P(' she') - log P(' he')" and "a, b" not in alike.about
    assert alike.about["data"] == "planted professions"
    assert subset("tasks-gpt2", person, k=1, how="top-k").outcome == alike.outcome
    asked = "--at", "L0.attn.H0", "--kind", "total"
    said = good("--data", "gender-bias", "--count", 6, *asked).stdout  # on the model that it is made for
    assert f"total effect {amount(float(bias.total.mean()), 3)} [" in said and bias.total.min() > 1
    assert "tasks-gpt2" in good("--data", "year-spans", "--count", 2, *asked, "--json").stdout
    own = good("-m", "tasks-gpt2", "--data", "pronouns", "--count", 2, *asked).stdout  # for its tokenizer
    assert "total effect" in own


def test_causal_tracing_is_the_librarys(stories, tmp_path):
    good("--base", BASE, "--noise", "wonderful", "--at", "L1@*", "-o", tmp_path / "map.json")
    found = relprop.Effects.open(tmp_path / "map.json")
    expected = tracing("reviews-bert", BASE, corrupt=2, at="L1@*")
    assert found.mediators == expected.mediators and found.indirect.equal(expected.indirect)
    assert found.total.abs().min() > 1e-3 and found.about["corrupt"] == "wonderful"
    good("-m", stories, "--data", stories / "pairs.jsonl", "--noise", "who", "--at", "L*.mlp@3", "--window", 2,
         "-o", tmp_path / "who.json")
    pairs = data.pairs(stories / "pairs.jsonl").take([0, 1])
    subject = relprop.load(str(stories))
    who = relprop.Effects.open(tmp_path / "who.json")
    expected = tracing(subject, pairs.bases, LogOdds(*data.matched(subject, pairs).continuations), corrupt=1, window=2,
                       at="L*.mlp@3")
    assert who.indirect.equal(expected.indirect) and who.outcome == "log P(' he') - log P(' she')"
    one = json.loads(good("-m", stories, "--base", "The nurse said that", "--noise", "1", "--continuation", " he",
                          "--at", "L0@1", "--json").stdout)
    he = subject.tokenizer.encode(" he", add_special_tokens=False)[0]
    assert one["counterfactual"] == tracing(subject, "The nurse said that", Probability(Token(he)), corrupt=1,
                                            at="L0@1").counterfactual.tolist()


@pytest.mark.parametrize("arguments, said", [
    ([*REVIEW, "--each-layer"], "--each-layer goes with --subset"), ([*REVIEW, "--window", "2"], "goes with --noise"),
    ([*REVIEW, "--subset", "2", "--estimate", "relevance"], "--subset does not go with --estimate"),
    ([*REVIEW, "--noise", "film"], "--noise does not go with --counterfactual"),
    (["--base", BASE, "--noise", "film", "--subset", "2"], "--subset does not go with --noise"),
    (["--base", BASE, "--noise", "awful"], "input 0 has no such words"),
    ([*REVIEW, "--verify", "3"], "verify"), ([*REVIEW, "--estimate", "guess"], "guess"),
    ([], "give --data, or --base"), (["--base", BASE], "give --data, or --base"),
    (["--data", "digits-swap", *REVIEW], "give --data, or --base"),
    (["--base", BASE, *REVIEW], "2 --base and 1 --counterfactual"),
    (["--base", BASE, "--counterfactual", BASE], "so nothing has an effect"),
    (["--base", BASE, "--counterfactual", "A truly bad film."], "a | wonderful | film | . | [SEP], and 7"),
    (["--data", "elsewhere"], "no pairs 'elsewhere'"), (["--data", "digits-swap", "-m", "reviews-bert"], "reads text"),
    ([*REVIEW, "--at", "L9.attn.H0"], "no layer 9"), ([*REVIEW, "--at", "L0.attn.H99"], "no H99"),
    ([*REVIEW, "--at", "L0.mlp@77"], "row 0 has 6 positions"), ([*REVIEW, "--at", "L0@job"], "no span of this name"),
    ([*REVIEW, "--at", "heads"], "is no address"), ([*REVIEW, "--at", "L0.cross.H0"], "no attention to an encoder"),
    ([*REVIEW, "--kind", "straight"], "total, direct, indirect, controlled, not straight"),
    ([*REVIEW, "--kind", "controlled"], "--kind controlled --fixed zero"),
    ([*REVIEW, "--kind", "total", "--fixed", "zero"], "go together"),
    ([*REVIEW, "--fixed", "none"], "--fixed is zero, mean or a number, not 'none'"),
    ([*REVIEW, "--scale", "log"], "not 'log'"), ([*REVIEW, "--outcome", "GREAT"], "no label 'GREAT'"),
    ([*REVIEW, "--outcome", "ratio"], "two continuations, and there are 0"),
    ([*REVIEW, "--continuation", "he", "--continuation", "she"], "no label 'he'"),
    ([*REVIEW, "--outcome", "kl", "--scale", "ratio"], "a ratio to it is undefined"),
    ([*REVIEW, "--align", "words"], "--align is slots, not 'words'"),
    ([*REVIEW, "--held", "L0"], "--held goes with --receiver"),
    ([*REVIEW, "--receiver", "L1", "--kind", "direct"], "--receiver does not go with --kind"),
    ([*REVIEW, "--receiver", "L1", "--subset", "2"], "does not go with"),
    ([*REVIEW, "--receiver", "L1", "--receiver", "outcome"], "--receiver outcome is for itself"),
    ([*REVIEW, "-o", "x.xlsx"], "cannot write effects to x.xlsx"),
    ([*REVIEW, "-o", "nowhere/x.png"], "there is no folder nowhere")])
def test_bad_input_is_one_line(arguments, said):
    result = run(*arguments)
    assert result.exit_code == cli.BAD_INPUT, result.output + repr(result.exception)
    assert said in result.stderr and result.stderr.startswith("relprop: error: ") and result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_several_tokens_where_one_is_needed(stories):
    two = "--base", "The nurse said", "--counterfactual", "The man said"
    result = run("-m", stories, *two, "--continuation", "un known")
    assert result.exit_code == cli.BAD_INPUT
    assert "is 2 tokens, ['un', 'known'], where one is needed" in result.stderr


def test_tokens_are_none_of_a_classifier():
    with pytest.raises(ValueError, match="predicts no tokens; give two labels"):
        relprop.effects("reviews-bert", [BASE], [OTHER], LogOdds([[5]], [[6]]))


def test_a_small_ratio_is_no_zero_because_another_one_is_large():
    from relprop.mediation.measurement import check_defined

    class Asked:
        subject, outcome = relprop.load("reviews-bert"), Value("POSITIVE")

    base, changed = torch.tensor([1e-6, 1e6]).double(), torch.tensor([2e-6, 3e6]).double()
    found = {"base": base, "counterfactual": changed, "indirect_outcome": torch.stack([base, changed])}
    check_defined(Asked, found, "ratio")
    with pytest.raises(Undefined, match="of base 0 is zero"):
        check_defined(Asked, {**found, "counterfactual": torch.tensor([1e3, 3e6]).double()}, "ratio")
    with pytest.raises(Undefined, match="whatever is changed"):
        check_defined(Asked, {"base": base, "counterfactual": base * (1 + 1e-8)}, "difference")


@pytest.mark.slow
def test_the_demo_names_the_heads(tmp_path):
    demo = Path(__file__).parents[1] / "demos" / "gender_bias.py"
    assert len(demo.read_text().splitlines()) <= 60
    said = subprocess.run([sys.executable, demo, tmp_path], capture_output=True, text=True, check=True).stdout
    assert "rank correlation with what was planted 0.99" in said or "was planted 1.0" in said
    assert {f"{name}.{suffix}" for name in ("heads", "few", "neurons", "traced") for suffix in ("html", "png")} == {
        path.name for path in tmp_path.iterdir()}
