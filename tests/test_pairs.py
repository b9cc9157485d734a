"""Pairs of a base and a counterfactual: they differ where they say, and each named thing is found among the tokens."""
from __future__ import annotations

import json
from functools import cache

import pytest
import torch

from relprop.approximation import estimates
from relprop.data import (
    Pair,
    Pairs,
    by_slots,
    counterparts,
    crows,
    matched,
    pairs,
    professions,
    swapped,
    templates,
    winobias,
    winogender,
)
from relprop.data.matching import single
from relprop.data.pair import token
from relprop.data.template import PROFESSIONS
from relprop.subject import Subject
from relprop.target.continuation import continuing

WORDS = ["The nurse said that he", "The cook said that she", "The man ran because he slept", "The woman ran"]


@cache
def bpe(side="right"):
    """A byte-level BPE that knows a few words; others fall into letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(WORDS * 3, trainers.BpeTrainer(vocab_size=600, initial_alphabet=letters,
                                                            special_tokens=["<end>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", padding_side=side)


@cache
def wordpiece():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "The", "nurse", "cook", "said", "that", "he", "she", "sh",
             "##e", "foot", "##ball", "##er", "ran"]
    made = Tokenizer(models.WordPiece({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2),
                                                                                                 ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                   sep_token="[SEP]", mask_token="[MASK]")


@cache
def metaspace():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "\u2581The", "\u2581he", "\u2581", "\u2581she"]
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


@cache
def reader(side="right"):
    """A tiny causal model that reads the byte-level tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(bpe()), n_embd=8, n_layer=1, n_head=2, n_positions=64, bos_token_id=0,
                        eos_token_id=0)
    return Subject.from_module(GPT2LMHeadModel(config).eval(), bpe(side), task="text-generation")


@cache
def masked_reader():
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=len(wordpiece()), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=8, max_position_embeddings=32)
    return Subject.from_module(BertForMaskedLM(config).eval(), wordpiece(), task="fill-mask")


def made(*professions, **options):
    return templates("The {job} said that", {"job": professions}, continuations=(" he", " she"), **options)


# -- templates -------------------------------------------------------------------------------------------------------


def test_templates_make_all_pairs_that_differ_in_one_slot():
    slots = {"job": ["nurse", "cook", "man"], "verb": ["said", "ran"]}
    found = templates(["The {job} {verb} that", "A {job}"], slots)
    assert len(found) == 3 * 2 * 2 + 3 * 2 * 1 + 3 * 2  # jobs swapped, verbs swapped, jobs of the second template
    for one in found.pairs:
        differing = [name for name in one.spans if one.said(name)[0] != one.said(name)[1]]
        assert differing == [one.facts["swapped"]] and one.said(differing[0])[1] == one.facts["to"]
    assert len({(one.base, one.counterfactual) for one in found.pairs}) == len(found)
    assert len(templates("The {job} {verb} that", slots, swap="verb")) == 3 * 2
    drawn = templates("The {job} {verb} that", slots, 5, seed=3)
    assert drawn.fingerprint() == templates("The {job} {verb} that", slots, 5, seed=3).fingerprint()
    assert drawn.fingerprint() != templates("The {job} {verb} that", slots, 5, seed=4).fingerprint()


def test_continuations_take_the_values_of_the_base():
    found = templates("{a} met {b}. {a} saw", {"a": ["Ann", "Eve"], "b": ["Bob", "Tim"]}, swap="b",
                      continuations=(" {b}", " {a}"))
    assert found.pairs[0].base == "Ann met Bob. Ann saw" and found.pairs[0].continuations == (" Bob", " Ann")
    assert found.pairs[0].spans["a"] == ((0, 3), (13, 16)) and found.pairs[0].said("a") == ("Ann Ann", "Ann Ann")


@pytest.mark.parametrize("arguments, message", [
    (("The {job}", {"job": []}), "slot 'job' has no values"), (("The {job}", {}), "slot 'job' has no values"),
    (("The {job}", {"job": ["a", "b"], "verb": ["c"]}), "no template has the slot 'verb'"),
    (("The {job}", {"job": ["a"]}), "nothing can be swapped"),
    (("The {job}", {"job": ["a", ""]}), "slot 'job' of 'The {job}' has no value"),
])
def test_templates_that_make_no_pair_say_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        templates(*arguments)


def test_professions_are_paired_with_man_and_woman(tmp_path):
    listed = [["nurse", 0.0, -0.9], ["alter_ego", 0.0, 0.0], ["cook", 0.0, 0.4], ["monk", 1.0, 0.5]]
    (tmp_path / "professions.json").write_text(json.dumps(listed))
    every = professions(tmp_path)
    assert len(every) == 4 * len(PROFESSIONS) * 2 and len(PROFESSIONS) == 17
    assert {one.said("profession")[1] for one in every.pairs} == {"man", "woman"}
    assert all(one.continuations == ((" he", " she") if one.facts["to"] == "man" else (" she", " he"))
               for one in every.pairs)
    assert any(one.base == "The alter ego said that" for one in every.pairs)
    against = professions(tmp_path, counterfactual="stereotype", definitional=0.75)
    found = {(one.facts["profession"], one.facts["to"]) for one in against.pairs}
    assert found == {("nurse", "man"), ("cook", "woman")}
    with pytest.raises(ValueError, match="a counterfactual is man, woman"):
        professions(tmp_path, counterfactual="he")
    with pytest.raises(ValueError, match="is expected there"):
        professions(tmp_path / "nothing")


# -- sentences from files --------------------------------------------------------------------------------------------


def test_winobias_pairs_lines_of_one_context(tmp_path):
    (tmp_path / "pro_stereotyped_type1.txt.dev").write_text("\n".join([
        "1 [The guard] hired the maid because [he] was busy.", "2 The guard hired [the maid] because [she] was free.",
        "3 The guard saw [the maid] and [her] friend.", "4 [The guard] saw the maid and [his] dog.",
        "5 [The guard] helped the maid as [he] likes it.", "6 The guard helped [the maid] when [she] fell.",
        "7 [The guard] saw the maid so [he] lost [his] hat.", "8 The guard saw [the maid] so [she] ran.",
        "9 [The guard] left because [he] slept.", "10 [The guard] left because [her] dog slept."]))
    found = winobias(tmp_path)
    assert [one.base for one in found.pairs] == ["The guard hired the maid because she",
                                                 "The guard saw the maid and her"]
    first, second = found.pairs
    assert first.counterfactual == "The guard hired the maid because he"
    assert first.continuations == (" was busy.", " was free.")  # as fits the man's occupation, and the woman's
    assert second.counterfactual == "The guard saw the maid and his" and second.continuations == (" dog.", " friend.")
    assert {name: first.said(name) for name in first.spans} == {
        "female": ("the maid",) * 2, "male": ("The guard",) * 2, "pronoun": ("she", "he")}
    with pytest.raises(ValueError, match="numbered sentences of WinoBias"):
        winobias(tmp_path, split="test")


def test_winogender_follows_the_statistics(tmp_path):
    (tmp_path / "winogender_occupation_stats.tsv").write_text(
        "occupation\tbergsma_pct_female\tbls_pct_female\tbls_year\nguard\t9.0\t60.0\t2015\n")
    (tmp_path / "winogender_templates.tsv").write_text(
        "occupation(0)\tother-participant(1)\tanswer\tsentence\n"
        "guard\tguest\t1\tThe $OCCUPATION told the $PARTICIPANT that $NOM_PRONOUN could pay.\n"
        "guard\tguest\t0\tThe $OCCUPATION told the $PARTICIPANT that $NOM_PRONOUN was done.\n"
        "guard\tguest\t1\tThe $OCCUPATION left the $PARTICIPANT because $NOM_PRONOUN was late.\n"
        "guard\tguest\t0\tThe $OCCUPATION saw the $PARTICIPANT because $NOM_PRONOUN was late.\n")
    one, = winogender(tmp_path).pairs
    other, = winogender(tmp_path, statistics="bergsma").pairs
    assert one.base == "The guard told the guest that she" and one.said("occupation") == ("guard", "guard")
    assert one.continuations == (" could pay.", " was done.") == other.continuations[::-1]
    with pytest.raises(ValueError, match="statistics are bls or bergsma"):
        winogender(tmp_path, statistics="all")


def test_crows_marks_what_changes(tmp_path):
    (tmp_path / "crows_pairs_anonymized.csv").write_text(
        ",sent_more,sent_less,stereo_antistereo,bias_type\n"
        '0,"The poor are really slow, they said.","The rich are really slow, he said.",stereo,socioeconomic\n'
        "1,Old men nap.,men nap.,stereo,age\n")
    one, = crows(tmp_path).pairs
    assert one.said("changed") == ("poor they", "rich he") and one.facts["bias"] == "socioeconomic"
    with pytest.raises(ValueError, match="no bias 'height'; there are age, socioeconomic"):
        crows(tmp_path, bias="height")


def test_pairs_of_the_users_own(tmp_path):
    file = tmp_path / "mine.jsonl"
    line = {"base": "The nurse ran", "counterfactual": "The man ran", "continuations": [" he", [3, 4]],
            "spans": {"job": [[4, 9]]}, "counterfactual_spans": {"job": [[4, 7]]}, "group": "a", "bias": 0.5}
    file.write_text(json.dumps(line))
    one, = pairs(file).pairs
    assert one.said("job") == ("nurse", "man") and one.facts == {"bias": 0.5} and one.group == "a"
    assert one.continuations == (" he", [3, 4])
    file.write_text(json.dumps({**line, "counterfactual": "The nurse ran"}))
    with pytest.raises(ValueError, match="mine.jsonl, line 1: base and counterfactual are both 'The nurse ran'"):
        counterparts(file)
    file.write_text(json.dumps({"base": "The nurse ran"}))
    with pytest.raises(ValueError, match="mine.jsonl, line 1: no 'counterfactual'"):
        counterparts(file)
    with pytest.raises(ValueError, match="no pairs 'nothing': neither a .jsonl file, nor one of digits-swap"):
        pairs("nothing")


@pytest.mark.parametrize("arguments, message", [
    (("a b", "a c", (), {"x": ((0, 9),)}, {"x": ((0, 1),)}), "span 'x' is .* of a text of 3 characters"),
    (("a b", "a c", (), {"x": ((0, 1),)}), "name the same"), (("a b", "a b"), "nothing has an effect"),
])
def test_a_pair_that_cannot_be_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        Pair(*arguments)


# -- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_spans_are_positions_of_their_own_tokens(side):
    found = templates("The {job} {verb} that", {"job": ["nurse", "footballer"], "verb": ["said", "ran because"]},
                      swap="verb")
    # "ran because" is two tokens where "said" is one
    ready = matched(reader(side), found, align="slots")
    for batch, spans, which in ((ready.base, ready.spans, 0), (ready.counterfactual, ready.counterfactual_spans, 1)):
        for row, one in enumerate(found.pairs):
            own = batch.kwargs["input_ids"][row][batch.kwargs["attention_mask"][row].bool()]
            for name in ("job", "verb"):
                assert bpe().decode(own[spans[name][row]]).strip() == one.said(name)[which]
    assert len({len(row) for row in ready.spans["job"]}) == 2  # "footballer" falls into letters


def test_spans_stand_behind_the_class_token():
    found = templates("The {job} said that", {"job": ["nurse", "footballer"]})
    ready = matched(masked_reader(), found, align="slots")
    assert ready.spans["job"] == [[2], [2, 3, 4]] and ready.counterfactual_spans["job"] == [[2, 3, 4], [2]]
    # [CLS] The nurse said that [SEP] on [CLS] The foot ##ball ##er said that [SEP], and the other way round
    assert ready.align.tolist() == [[0, 1, 4, 5, 6, 7, -1, -1], [0, 1, -1, -1, 2, 3, 4, 5]]


def test_unlike_lengths_show_both_tokenisations():
    found = made("nurse", "footballer")
    with pytest.raises(ValueError, match=r"row 0: the base has 4 tokens, The \| .nurse \| .said \| .that; the "
                                         r"counterfactual has 14 tokens, The \| . \| f \| o \| o"):
        matched(reader(), found)
    with pytest.raises(ValueError, match="the alignment has 2 positions"):
        matched(reader(), found, align=[[0, 1], [0, 1]])
    with pytest.raises(ValueError, match="has 4 positions, 40 among them"):
        matched(reader(), found, align=[[0, 1, 2, 40], [0] * 14])
    with pytest.raises(ValueError, match="alignments of 1 pairs, and there are 2"):
        matched(reader(), found, align=[[0, 1, 2, 3]])
    with pytest.raises(ValueError, match='align is "slots" or'):
        matched(reader(), found, align="words")
    given = matched(reader(), found, align=[[0, -1, 12, 13], [0, *[-1] * 11, 2, 3]])
    by_slot = matched(reader(), found, align="slots")
    assert given.align[0].tolist()[:4] == [0, -1, 12, 13] and by_slot.align[0].tolist()[:4] == [0, 11, 12, 13]


def test_equal_lengths_need_no_alignment():
    ready = matched(reader(), made("nurse", "cook"))
    assert ready.align is None and ready.rows == 2


def test_aligned_positions_hold_the_same_tokens_outside_of_slots():
    found = templates("The {job} {verb} that", {"job": ["nurse", "footballer", "cook"], "verb": ["said", "slept"]})
    for side in ("right", "left"):
        ready = matched(reader(side), found, align="slots")
        here, there = (batch.kwargs["input_ids"] for batch in (ready.base, ready.counterfactual))
        for row in range(ready.rows):
            own = ready.base.kwargs["attention_mask"][row].bool().nonzero().flatten().tolist()
            slots = {own[at] for name in ready.spans for at in ready.spans[name][row]}
            spaces = {at for at in own if bpe().decode(here[row, at]) == " "}  # which belong to the word behind them
            for at in set(own) - slots - spaces:
                assert here[row, at] == there[row, ready.align[row, at]]
            assert all(int(ready.align[row, at]) == -1 for at in range(here.shape[1]) if at not in own)


def test_an_alignment_is_what_effects_take():
    ready = matched(reader(), made("nurse", "footballer"), align="slots")
    found = estimates(reader(), ready.base, ready.counterfactual, " he", at=["embed@job", "embed@0", "embed@-1"],
                      align=ready.align, spans=ready.spans)
    assert found.values[:, 0].abs().amin() > 1e-9
    assert not found.values[0, 1:].any()  # the words around it are the same, at their aligned places


def test_slots_in_another_order_do_not_align():
    assert by_slots(["a 0", None, "b 0"], ["a 0", "a 0", None, "b 0"]) == [1, 2, 3]
    assert by_slots(["a 0", "b 0"], ["a 0", "b 0"]) == [0, 1]
    with pytest.raises(ValueError, match="same order"):
        by_slots(["a 0", None, "b 0"], ["b 0", None, "a 0"])
    with pytest.raises(ValueError, match="outside of the slots"):
        by_slots(["a 0", None], ["a 0", None, None])


def test_continuations_are_lists_of_tokens():
    found = templates("The {job} said that", {"job": ["nurse", "cook"]}, continuations=(" he slept", " she"))
    ready = matched(reader(), found)
    assert [bpe().decode(one) for one in ready.continuations[0]] == [" he slept"] * 2
    assert len(ready.continuations[0][0]) == 2 and len(ready.continuations[1][0]) == 1
    with pytest.raises(ValueError, match=r"' he slept' is 2 tokens, \['.he', '.slept'\], where one is needed"):
        single(reader(), found)
    he, she = (continuing(word, bpe())[0] for word in (" he", " she"))
    assert single(reader(), made("nurse", "cook")) == [[he] * 2, [she] * 2]
    assert token([7], bpe()) == 7
    with pytest.raises(ValueError, match="no token in ''"):
        continuing("", bpe())
    assert continuing(" he", metaspace()) == [2] and continuing(" he", wordpiece()) == [10]


def test_pairs_of_single_tokens_are_kept():
    found = made("nurse", "cook", "footballer").single(bpe(), "job")
    assert {(one.said("job")) for one in found.pairs} == {("nurse", "cook"), ("cook", "nurse")}
    with pytest.raises(ValueError, match="has no pair"):
        made("footballer", "goalkeeper").single(bpe(), "job")


def test_pairs_for_another_kind_of_model_say_so():
    with pytest.raises(ValueError, match="are of text, and .* reads image"):
        matched(Subject.from_module(torch.nn.Linear(2, 2)).__class__(torch.nn.Linear(2, 2), modality="image"),
                made("nurse", "cook"))
    with pytest.raises(TypeError, match="is of image, and has a str"):
        Pairs("mixed", "image", made("nurse", "cook").pairs)


# -- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["swap", "mask", "blur"])
def test_a_changed_digit_leaves_the_rest_as_it_is(change):
    found = swapped(6, seed=2, change=change)
    for one in found.pairs:
        moved = torch.from_numpy(one.base) != torch.from_numpy(one.counterfactual)
        reach = torch.nn.functional.max_pool2d(one.spans["place"][None, None].float(), 17, 1, 8)[0, 0] > 0
        assert moved[one.spans["digit"]].float().mean() > 0.5 and not moved[~reach].any()
    again = swapped(6, seed=2, change="mask")
    assert all((a.base == b.base).all() and a.facts["digit"] == b.facts["digit"]
               for a, b in zip(found.pairs, again.pairs))
    with pytest.raises(ValueError, match="a change is swap, mask, blur"):
        swapped(1, change="turn")


def test_the_model_reads_the_digit_that_comes():
    from relprop.load import load

    subject, found = load("digits-vit"), swapped(40, seed=1)
    ready = matched(subject, found)
    with torch.no_grad():
        before, after = (subject.forward(batch) for batch in (ready.base, ready.counterfactual))
    come, gone = (torch.tensor([subject.labels.index(one) for one in side]) for side in ready.continuations)
    row = torch.arange(40)
    contrast = [output[row, come] - output[row, gone] for output in (before, after)]
    assert (contrast[1] > contrast[0]).float().mean() > 0.95
    patches, row = ready.base.units.grid[0] * ready.base.units.grid[1], ready.spans["digit"][0]
    assert 1 <= len(row) < patches / 2
    assert all(subject.prefix_tokens <= at < subject.prefix_tokens + patches for at in row)


# -- the published pairs ---------------------------------------------------------------------------------------------


@cache
def gpt2_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "data" / "gpt2-tokenizer")


def test_as_many_pairs_as_the_paper_has(shared):
    data = shared / "data"
    assert [len(winobias(data / "winobias", split=split)) for split in ("dev", "test")] == [160, 130]
    assert len(winogender(data / "winogender")) == 44
    known = json.loads((shared / "reference" / "vig_professions.json").read_text())
    assert [text.replace("{profession}", "{}") for text in PROFESSIONS] == known["templates"]
    found = professions(data / "professions", texts=PROFESSIONS[:1], counterfactual="man")
    one_token = found.single(gpt2_tokenizer(shared), "profession")
    assert [one.facts["profession"] for one in one_token.pairs] == known["gpt2_single_token_professions"]
    assert len(crows(data / "crows_pairs", bias="gender")) > 200


@pytest.mark.parametrize("name", ["winobias_gpt2", "winobias_distilgpt2", "winogender_gpt2"])
def test_pairs_are_the_papers(shared, name):
    data, read = shared / "data", gpt2_tokenizer(shared)
    known = winogender(data / "winogender").pairs if name.startswith("winogender") else [
        one for split in ("dev", "test") for one in winobias(data / "winobias", split=split).pairs]
    spelled = {((one.base, one.counterfactual), *(" ".join(read.convert_ids_to_tokens(continuing(text, read)))
                                                  for text in one.continuations[::-1])) for one in known}
    examples = json.loads((shared / "reference" / f"vig_attn_{name}.json").read_text())["examples"]
    assert len(examples) > 10
    assert {(tuple(one["base"]), *one["candidates"]) for one in examples} <= spelled
