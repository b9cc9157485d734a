"""Tasks: prompts on any tokenizer, their metrics, and the circuits of the bundled models."""
from __future__ import annotations

import gzip
import json
from importlib import import_module

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

import relprop
from relprop.circuit import Task, circuit
from relprop.circuit.ablated import ablated
from relprop.circuit.evaluation import curve, faithfulness
from relprop.circuit.recovery import recovery
from relprop.circuit.statistic import against_random
from relprop.circuit.task import posed
from relprop.data import DRAWN, SPOKEN, Pair, Pairs, pairs
from relprop.data.pair import modality
from relprop.intervene.change import values_at
from relprop.mediation import KL, LogOdds, Margin, Mass
from relprop.subject import Subject
from relprop.target.continuation import continuing

NAMES = ("ioi", "greater-than", "docstring", "pronouns", "induction")


def _tokenizer(pattern: str, texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer whose tokens are what the pattern finds in these texts."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    found = dict.fromkeys(piece for text in texts for piece, _ in split.pre_tokenize_str(text))
    made = Tokenizer(models.WordLevel({"<unk>": 0, **{piece: at for at, piece in enumerate(found, 1)}}, "<unk>"))
    made.pre_tokenizer = split
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def _subject(tokenizer: object, width: int = 8) -> Subject:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=width, vocab_size=len(tokenizer), n_positions=128)
    return relprop.load(transformers.GPT2LMHeadModel(config).eval().double(), tokenizer)


def _words() -> list[str]:
    """Every word of our prompts, and their sentences with their slots."""
    gender, indirect, year, docstring, repeat = (import_module(f"relprop.data.{name}") for name in
                                                 ("gender", "indirect", "year", "docstring", "repeat"))
    listed = [*indirect.NAMES, *indirect.PLACES, *indirect.THINGS, *gender.FEMALE, *gender.MALE, *docstring.WORDS,
              *year.NOUNS, *year.CENTURIES, "he", "she"]
    texts = [*indirect.SENTENCES, *gender.SENTENCES, year.SENTENCE, docstring.SENTENCE, repeat.BEGINNING]
    return [*texts, *(f" {word}" for word in listed), *docstring.WORDS, *year.YEARS]


PIECES = r"""'t|\d\d| \d\d| ?[A-Za-z]+|""\"|.|\s"""


@pytest.fixture(scope="module")
def subject() -> Subject:
    return _subject(_tokenizer(PIECES, _words()))


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_prompts_suit_a_tokenizer_and_name_their_positions(subject, name):
    task = Task.named(subject, name, count=6, seed=1)
    one = task.prepared(subject)
    wanted = {"ioi": LogOdds, "greater-than": Mass, "docstring": Margin, "pronouns": LogOdds, "induction": LogOdds}
    assert type(task.metric) is wanted[name] and one.rows == 6 and "end" in task.spans
    rows = zip(one.clean.units.tokens, one.corrupted.units.tokens, one.clean.units.padding)
    for row, (clean, corrupted, padding) in enumerate(rows):
        assert "<unk>" not in clean + corrupted or any(padding)
        at = {span: places[row] for span, places in task.spans.items()}
        own = [token for token, gone in zip(clean, padding) if not gone]
        assert at["end"] == [len(own) - 1] and all(len(places) == 1 for places in at.values())
        said = {span: clean[places[0]].strip() for span, places in at.items()}
        other = {span: corrupted[places[0]].strip() for span, places in at.items()}
        if name == "ioi":
            assert said["S1"] == said["S2"] != said["IO"] and at["S1_next"] == [at["S1"][0] + 1]
            assert not {said["S1"], said["IO"]} & {other["S1"], other["S2"], other["IO"]}
        elif name == "greater-than":
            assert said["YY"].isdigit() and other["YY"] == "01" and said["century"] == said["end"]
        elif name == "docstring":
            assert said["A_def"] == said["A_doc"] != other["A_def"] and other["A_def"] != other["A_doc"]
        elif name == "pronouns":
            assert said["name"] != other["name"]
        else:
            assert said["A1"] == said["end"] == other["A1"] and said["B1"] != other["B1"]
    assert one.measured[0].shape == (6,) and (one.measured[0] != one.measured[1]).all()
    assert Task.named(subject, name, count=6, seed=1).about["pairs"] == task.about["pairs"]
    assert Task.named(subject, name, count=6, seed=2).about["pairs"] != task.about["pairs"]


def test_answers_are_what_the_task_says(subject):
    made = pairs("ioi", count=8, tokenizer=subject.tokenizer).pairs
    assert all(one.answers[0].strip() == one.facts["IO"] and one.wrong[0].strip() == one.facts["S"] for one in made)
    assert {one.facts["order"] for one in made} == {"abba", "baba"}
    flipped = SPOKEN["ioi"](subject.tokenizer, 4, corruption="other giver").pairs
    assert all(one.counterfactual.count(one.facts["IO"]) == 2 for one in flipped)
    years = pairs("greater-than", count=5, tokenizer=subject.tokenizer).pairs
    for one in years:
        later = [subject.tokenizer.convert_ids_to_tokens(list(answer))[0] for answer in one.answers]
        assert later == [f"{year:02d}" for year in range(int(one.facts["year"]) + 1, 100)]
        assert len(one.wrong) + len(later) == 100
    made = pairs("docstring", count=3, tokenizer=subject.tokenizer).pairs
    assert all(one.base.count(one.answers[0]) == 1 and len(one.wrong) == 10 for one in made)
    made = pairs("pronouns", count=4, tokenizer=subject.tokenizer).pairs
    assert {one.answers for one in made} == {(" she",), (" he",)}


def test_metrics_are_those_of_their_definition(subject):
    z = lambda one: subject.model(**one.clean.kwargs).logits.detach()[torch.arange(one.rows), one.clean.last]
    one = Task.named(subject, "greater-than", count=3).prepared(subject)
    p, task = z(one).softmax(-1), one.task.metric
    mass = torch.stack([p[row, right].sum() - p[row, wrong].sum() for row, (right, wrong) in
                        enumerate(zip(task.right, task.wrong))])
    torch.testing.assert_close(one.measured[0], mass)
    one = Task.named(subject, "docstring", count=3).prepared(subject)
    task = one.task.metric
    margin = torch.stack([z(one)[row, right[0]] - z(one)[row, wrong].max() for row, (right, wrong) in
                          enumerate(zip(task.right, task.wrong))])
    torch.testing.assert_close(one.measured[0], margin)
    as_difference = Task.named(subject, "ioi", count=3, metric="probability difference").prepared(subject)
    assert float(as_difference.measured[0].abs().max()) < 1
    assert isinstance(Task.named(subject, "ioi", count=3, metric="KL").metric, KL)
    own = Task.named(subject, "ioi", count=3, metric=KL()).prepared(subject)
    torch.testing.assert_close(own.measured[0], torch.zeros(3).double(), atol=1e-12, rtol=0)


def test_values_have_gradients_and_rows_of_their_own(subject):
    for name in ("ioi", "greater-than", "docstring"):
        one = Task.named(subject, name, count=4).prepared(subject)
        output = subject.forward(one.take([2]).clean)
        value = one.value(output, rows=[2])
        torch.testing.assert_close(value.detach(), one.measured[0][2:3])
        assert torch.autograd.grad(value.sum(), output.logits)[0].abs().sum() > 0
        torch.testing.assert_close(one.take([3, 1]).measured[0], one.measured[0][[3, 1]])
        torch.testing.assert_close(one.take([3, 1]).forward(1), one.measured[1][[3, 1]])
    part = posed(subject, one.take([3, 1]), metric=KL())
    torch.testing.assert_close(part.measured[1], posed(subject, one, metric=KL()).measured[1][[3, 1]])


@pytest.mark.parametrize("name", ["ioi", "docstring", "pronouns", "induction"])
def test_masked_models_are_asked_at_their_mask(name):
    tokenizer = _tokenizer(PIECES, _words())
    tokenizer.add_special_tokens({"mask_token": "[MASK]", "pad_token": "[PAD]"})
    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=8,
                                     vocab_size=len(tokenizer), max_position_embeddings=128)
    subject = relprop.load(transformers.BertForMaskedLM(config).eval().double(), tokenizer)
    one = Task.named(subject, name, count=4).prepared(subject)
    for row, tokens in enumerate(one.clean.units.tokens):
        assert [tokens[at] for at in one.task.spans["end"][row]] == ["[MASK]"]
    assert (one.measured[0] != one.measured[1]).all()
    assert len(one.nodes("heads at positions")) == 2 * len(one.positions())


def test_positions_of_tasks_become_nodes(subject):
    one = Task.named(subject, "ioi", count=4).prepared(subject)
    nodes = one.nodes("heads at positions")
    assert set(nodes) == {f"L{layer}.attn.H{head}@{name}" for layer in (0, 1) for head in (0, 1)
                          for name in ("IO", "S1", "S1_next", "S2", "end")}
    assert [name.split(".")[0] for name in nodes] == sorted(name.split(".")[0] for name in nodes)
    bare = Task("bare", torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]]), 5).prepared(subject)
    assert bare.positions() == ["0", "1", "2"] and len(bare.nodes("mlps at positions")) == 6
    assert len(bare.nodes("neurons")) == 2 * 32
    assert set(bare.nodes(["L0.mlp", "L1.attn.H1"])) == {"L0.mlp", "L1.attn.H1"}
    uneven = {"input_ids": torch.tensor([[1, 2, 3], [1, 2, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    other = {**uneven, "input_ids": torch.tensor([[1, 4, 3], [1, 4, 0]])}
    with pytest.raises(ValueError, match="have 2 to 3 tokens"):
        Task("uneven", uneven, other, 5).prepared(subject).positions()
    with pytest.raises(ValueError, match="no level 'layers' of nodes"):
        one.nodes("layers")


def test_means_are_of_reference_inputs_of_the_same_template(subject):
    own = Task.named(subject, "ioi", count=24, seed=1)
    more = Task.named(subject, "ioi", count=3, seed=0, references=48)
    one = more.prepared(subject)
    tap = next(iter(one.nodes(["L0.attn.H0"]).values()))[0].tap
    for ablation in ("mean", "mean by position"):
        wanted = ablated(one, [tap], ablation)[tap]
        reference = pairs("ioi", count=48, seed=1, tokenizer=subject.tokenizer).pairs
        for row, group in enumerate(more.groups):
            texts = [pair.counterfactual for pair in reference
                     if f"{pair.facts['template']} {pair.facts['order']}" == group]
            batch = subject.prepare(texts)
            values = values_at(subject.model, batch.args, batch.kwargs, [tap])[tap]
            by_hand = values.mean(0) if ablation != "mean" else values.mean((0, 1)).expand(values.shape[1:])
            torch.testing.assert_close(wanted[row, :values.shape[1]], by_hand)
        torch.testing.assert_close(ablated(one.take([1, 2]), [tap], ablation)[tap], wanted[1:])
    whole = own.prepared(subject)
    part = ablated(whole.take([0, 1]), [tap], "mean")[tap]  # means are of all rows all the same
    torch.testing.assert_close(part, ablated(whole, [tap], "mean")[tap][:2])
    with pytest.raises(ValueError, match="no reference input is of the group"):
        Task.named(subject, "ioi", count=24, references=1).prepared(subject)


def test_induction_for_models_without_a_tokenizer():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=30, n_positions=32)
    subject = Subject.from_module(transformers.GPT2LMHeadModel(config).eval())
    made = SPOKEN["induction"](30, 5, length=6)
    assert made.modality == "tokens" and modality(made.pairs[0].base) == "tokens"
    one = Task.of(subject, made).prepared(subject)
    for row, pair in enumerate(made.pairs):
        (a,), (b,), (end,) = (one.task.spans[name][row] for name in ("A1", "B1", "end"))
        assert pair.base[a] == pair.base[end] and pair.base[b] == pair.answers[0][0] != pair.wrong[0][0]
    assert one.measured[0].shape == (5,)
    for wrong, said in ((2, "at least 3"), (40, "too few")):
        with pytest.raises(ValueError, match=said):
            SPOKEN["induction"](30, 5, length=wrong)


def test_digits_on_canvases():
    subject = relprop.load("digits-vit")
    task = Task.named(subject, "digits-swap", count=3, seed=1)
    one = task.prepared(subject)
    assert (one.measured[0] > 5).all() and (one.measured[1] < -5).all()  # one digit is there, the other is not
    assert task.spans.keys() == {"place"} and len(one.nodes("heads at positions")) == len(one.nodes("heads"))
    bare = Task("bare", one.clean, one.corrupted, task.metric).prepared(subject)
    assert len(bare.positions()) == subject.prefix_tokens + 81
    found = circuit(subject, task, "random", level="heads")
    assert faithfulness(subject, task, found.top(0)).share.abs().max() == 0


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, said", [
    ("ioi", "of our 40 names are one token each, and 5 are needed; the tokenizer reads ' Mary' as"),
    ("greater-than", "each two last digits of a year as one token"),
    ("docstring", "words are one token each, and 20 are needed"),
    ("pronouns", "names of women are one token each"),
    ("induction", "words are one token each"),
])  # fmt: skip
def test_a_tokenizer_that_does_not_suit_is_told(name, said):
    letters = _subject(_tokenizer(r".|\s", ["".join(map(chr, range(32, 127))) + "\n"]))
    with pytest.raises(ValueError, match=said):
        Task.named(letters, name, count=2)


def test_words_that_are_not_known_are_no_single_tokens(subject):
    few = _subject(_tokenizer(PIECES, ["nothing of it"]))  # every name would be the one token <unk>
    with pytest.raises(ValueError, match="0 of our 40 names"):
        Task.named(few, "ioi", count=2)
    with pytest.raises(ValueError, match="give tokenizer="):
        pairs("ioi", count=2)


def test_answers_of_several_tokens_are_told(subject):
    several = Pair("When Mary went", "When John went", answers=(" to the store",), wrong=(" home",))
    with pytest.raises(ValueError, match="' to the store' is 3 tokens"):
        Task.of(subject, Pairs("mine", "text", [several]))
    given = Task("mine", ["When Mary went"], ["When John went"], LogOdds([[1, 2]], [[3]]))
    with pytest.raises(ValueError, match="give answers of one token each"):
        given.prepared(subject)


def test_pairs_that_are_no_task_are_told(subject):
    def task(*given, **more):
        made = [Pair("When Mary went", "When John went", **one) for one in given]
        return Task.of(subject, Pairs("mine", "text", made), **more)

    with pytest.raises(ValueError, match="pair 0 of 'mine' has no answers, .* metric='KL'"):
        task({})
    with pytest.raises(ValueError, match="has no wrong answers"):
        task({"answers": (" he",)})
    both = {"answers": (" he", " she"), "wrong": (" Mary",)}
    turned = {"answers": both["wrong"], "wrong": both["answers"]}
    assert isinstance(task(both).metric, Mass) and isinstance(task(turned).metric, Margin)
    with pytest.raises(ValueError, match="take the probability difference"):
        task(both, metric="logit difference")
    with pytest.raises(ValueError, match="no metric 'accuracy'; there are logit difference"):
        task(both, metric="accuracy")
    with pytest.raises(ValueError, match="they are not as many"):
        longer = Pair("When Mary went", "When John went to the", answers=(" he",), wrong=(" she",))
        Task.of(subject, Pairs("mine", "text", [longer]))
    with pytest.raises(ValueError, match="row 1 has no right token"):
        Mass([[1], []], [2]).pairs(subject, *(task(both).prepared(subject).clean.take([0, 0]),) * 2)


# -- files ------------------------------------------------------------------------------------------------------------


def test_files_of_prompts(subject, tmp_path):
    path = tmp_path / "mine.json.gz"
    line = {"clean": "When Mary and John went", "corrupt": "When Paul and Anna went", "answers": [" Mary"],
            "wrong_answers": [" John"]}
    path.write_bytes(gzip.compress(json.dumps({"prompts": [line], "word_idxs": {"IO": 1, "S1+1": 4}}).encode()))
    task = Task.named(subject, f"prompts:{path}")
    assert task.spans == {"IO": [[1]], "S1_next": [[4]], "end": [[4]]} and task.name == "mine"
    assert [subject.tokenizer.decode(one[0]) for one in (task.metric.a, task.metric.b)] == [" Mary", " John"]
    for broken, said in (({"prompts": [{"clean": "a"}]}, "prompt 0: no 'corrupt'"), ([1], "holds no prompts"),
                         ({"prompts": [{**line, "answers": [[1], [2]]}]}, "one place to answer at")):
        path.write_bytes(gzip.compress(json.dumps(broken).encode()))
        with pytest.raises(ValueError, match=said):
            Task.named(subject, f"prompts:{path}")


def test_prompts_for_gpt2(shared):
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "data" / "gpt2-tokenizer")
    subject = _subject(tokenizer)
    for name in NAMES:
        assert Task.named(subject, name, count=3).prepared(subject).rows == 3
    folder = shared / "data" / "circuits"
    metrics = {"ioi_prompts": LogOdds, "docstring_prompts": Margin, "greaterthan_gpt2-small_prompts": Mass,
               "ioi_vanilla_template_prompts": LogOdds, "animal_diet_short_prompts": LogOdds}
    for file, metric in metrics.items():
        task = Task.named(subject, f"prompts:{folder / file}.json.gz", count=4)
        assert type(task.metric) is metric and task.prepared(subject).measured[0].isfinite().all()
    vanilla = Task.named(subject, f"prompts:{folder / 'ioi_vanilla_template_prompts.json.gz'}", count=4)
    one = vanilla.prepared(subject)
    for row in range(4):
        token = lambda name, row=row: one.clean.units.tokens[row][vanilla.spans[name][row][0]]
        assert token("S1") == token("S2")
        assert continuing(token("IO").replace("Ġ", " "), tokenizer) == list(vanilla.metric.a[row])
    with pytest.raises(ValueError, match="one place to answer at"):
        Task.named(subject, f"prompts:{folder / 'tracr_reverse_len_5_prompts.json.gz'}", count=1)


# -- the bundled language model ---------------------------------------------------------------------------------------


def test_tasks_of_the_bundled_model():
    subject = relprop.load("tasks-gpt2")
    for name in ("indirect-objects", "year-spans"):
        assert name in DRAWN
        one = Task.named(subject, name, count=8).prepared(subject)
        clean, corrupted = one.measured
        assert (clean > 0.5).all() and clean.mean() > corrupted.mean() + 0.8


SHARES = (0.05, 0.1, 0.2)
"""Of the total effect: nodes whose exact effect is at least so large in size are the ones to be found."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["indirect-objects", "year-spans"])
def test_methods_rank_nodes_as_exhaustive_patching_does(name):
    subject, level = relprop.load("tasks-gpt2"), "heads at positions"
    task = Task.named(subject, name, count=64).prepared(subject)
    exact = circuit(subject, task, "exact", level=level)
    found = {method: circuit(subject, task, method, level=level) for method in ("relp", "cdt", "random")}
    for share in SHARES:
        known = exact.threshold(share * abs(exact.total))
        assert 0 < len(known) < len(exact.nodes) / 4
        auc = {method: recovery(one, known).auc for method, one in found.items()}
        assert auc["relp"] >= 0.97 and auc["cdt"] >= 0.97 and auc["random"] < 0.97, (share, auc)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cdt", "relp"])
def test_the_circuit_of_indirect_objects_keeps_the_logit_difference(method):
    """A third of the heads, found on some sentences and tried on others, the rest at its mean over 512 more."""
    subject = relprop.load("tasks-gpt2")
    found, *others = (Task.named(subject, "indirect-objects", count=128, seed=seed, references=512).prepared(subject)
                      for seed in (0, 10, 20))
    heads = circuit(subject, found, method, ablation="mean")
    small = heads.top(len(heads.nodes) // 3)
    assert len(small) == 10
    for tried in others:
        assert float(faithfulness(subject, tried, small).recovered) >= 0.95
    chance = against_random(subject, others[0], small, count=200)
    assert chance.beaten == 1.0 and chance.p < 0.01
    assert curve(subject, others[0], heads, fractions=[0.0, 0.3, 1.0]).share.tolist()[-1] == pytest.approx(1)
