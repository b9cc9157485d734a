"""An answer of several tokens is explained at once: behind its prompt, in one forward and one backward pass."""
from __future__ import annotations

import pytest
import torch
from lexicon import WRITTEN, writing

import relprop
from relprop import Answer, Contrast, Span, Token, explain, load

PROMPTS = ["alice was born in", "the dog walks"]


@pytest.fixture(autouse=True)
def _seeded(seed):
    """Every model here is random, the same each time."""


def made(kind, **config):
    model = kind(kind.config_class(**config)).double().eval()
    for parameter in model.parameters():  # biases start at zero, at which errors hide
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = 3
    return model


def gpt2(**options):
    from transformers import GPT2LMHeadModel

    model = made(GPT2LMHeadModel, vocab_size=len(WRITTEN), n_embd=16, n_layer=2, n_head=2, n_positions=40,
                 initializer_range=0.5, bos_token_id=2, eos_token_id=3, pad_token_id=0)
    return load(model, writing(**options))


def llama(**options):
    from transformers import LlamaForCausalLM

    model = made(LlamaForCausalLM, vocab_size=len(WRITTEN), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                 intermediate_size=32, max_position_embeddings=40, initializer_range=0.5, bos_token_id=2,
                 eos_token_id=3, pad_token_id=0)
    return load(model, writing(**options))


def t5(**options):
    from transformers import T5ForConditionalGeneration

    model = made(T5ForConditionalGeneration, vocab_size=len(WRITTEN), d_model=16, d_kv=8, d_ff=32, num_layers=2,
                 num_heads=2, pad_token_id=0, eos_token_id=3, decoder_start_token_id=0)
    return load(model, writing(begins=False, **options))


def bart(**options):
    from transformers import BartForConditionalGeneration

    model = made(BartForConditionalGeneration, vocab_size=len(WRITTEN), d_model=16, encoder_layers=1, decoder_layers=1,
                 encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
                 max_position_embeddings=40, init_std=0.5, pad_token_id=0, bos_token_id=2, eos_token_id=3,
                 decoder_start_token_id=0, forced_eos_token_id=None)
    return load(model, writing(begins=False, **options))


MODELS = {"gpt2": gpt2, "llama": llama, "t5": t5, "bart": bart}


def spelled(subject, text):
    return subject.tokenizer.encode(text, add_special_tokens=False)


def logits(subject, prompt, answer):
    """Logits with which each token of an answer is written, (A, V), by hand."""
    own, said = subject.tokenizer(prompt)["input_ids"], spelled(subject, answer)
    if subject.task == "text2text-generation":
        out = subject.model(input_ids=torch.tensor([own]), decoder_input_ids=torch.tensor([[0, *said]])).logits[0]
        return out[:-1], said
    return subject.model(torch.tensor([own + said])).logits[0, len(own) - 1:-1], said


def balanced(r) -> bool:
    return bool((r.ledger.error < 1e-9).all())


def absorbed(ledger):
    """What was absorbed by name; positions are told apart by how many there are, which differs among runs."""
    found = {}
    for name, amount in ledger.absorbed.items():
        name = "position embeddings" if "positions" in name else name
        found[name] = found.get(name, 0) + amount
    return found


def words(r, row=0):
    return torch.tensor([value for _, value in r.words(row)])


@pytest.mark.parametrize("name", MODELS)
def test_an_answer_is_the_sum_over_its_tokens(name):
    subject = MODELS[name]()
    for measure in ("logprob", "logit"):
        r = explain(subject, PROMPTS[:1], Answer(" paris in london", measure=measure))
        z, said = logits(subject, PROMPTS[0], " paris in london")
        z = z.log_softmax(-1) if measure == "logprob" else z
        assert torch.allclose(r.value.double(), z[torch.arange(3), said].sum(), atol=1e-5)
        assert balanced(r) and words(r).abs().min() > 0 and r.forwards == r.backwards == 1
        assert [word for word, _ in r.words(0)] == PROMPTS[0].split()
    assert r.target == ["logit of ' paris in london'"]


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_what_a_decoder_reads_stands_apart(name):
    """The map is of the encoder's words; the ledger has what the decoder's own tokens take beside it."""
    subject = MODELS[name]()
    r = explain(subject, PROMPTS, [Answer(" paris in"), Token(" bob")])
    own = r.inputs["decoder_input_ids"].double().flatten(1).sum(1)
    assert own.abs().min() > 0 and balanced(r)
    assert torch.allclose(r.ledger.parts["decoder"], own, atol=1e-5)
    assert torch.allclose(r.ledger.parts["text"], r.map.sum(1).double(), atol=1e-5)
    assert torch.allclose(sum(r.ledger.parts.values()), r.ledger.input)
    assert [name for name, *_ in r.ledger.table(0)][:3] == ["value", "text", "decoder"]
    both = explain(subject, PROMPTS, Contrast(Answer(" paris in"), Answer(" bob")))
    assert torch.allclose(sum(both.ledger.parts.values()), both.ledger.input) and balanced(both)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_token_of_a_decoder(name):
    """The first one behind its start token, or one at a position of what it has begun with."""
    subject = MODELS[name]()
    batch = subject.prepare(PROMPTS)
    z = subject.model(**batch.kwargs).logits
    bob, = spelled(subject, " bob")
    r = explain(subject, PROMPTS, " bob")
    assert torch.allclose(r.value.double(), z[:, 0, bob], atol=1e-5) and balanced(r)
    begun = torch.tensor([[0, *spelled(subject, " paris in")]] * 2)
    given = {name: batch.kwargs[name] for name in ("input_ids", "attention_mask")} | {"decoder_input_ids": begun}
    z = subject.model(**given).logits
    for position in (0, 1, 2, -1):
        r = explain(subject, given, Token(" bob", position=position))
        assert torch.allclose(r.value.double(), z[:, position, bob], atol=1e-5) and balanced(r)


@pytest.mark.parametrize("name", MODELS)
def test_the_map_of_an_answer_is_the_sum_of_its_tokens_maps(name):
    subject, answer = MODELS[name](), " paris in london"
    whole = explain(subject, PROMPTS[:1], Answer(answer, measure="logit"))
    parts = [explain(subject, PROMPTS[:1], Answer(answer, part, measure="logit")) for part in (0, (1, 2), "london")]
    assert torch.allclose(whole.map, sum(part.map for part in parts), atol=1e-5)
    assert torch.allclose(whole.value, sum(part.value for part in parts), atol=1e-5)
    ledgers = [sum(part.ledger.absorbed.get(name, torch.zeros(1)) for part in parts) for name in whole.ledger.absorbed]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole.ledger.absorbed.values(), ledgers, strict=True))
    if name in ("gpt2", "llama"):  # the same tokens, each explained at its position of the whole text
        z, said = logits(subject, PROMPTS[0], answer)
        text = torch.tensor([subject.tokenizer(PROMPTS[0])["input_ids"] + said])
        first = text.shape[1] - len(said) - 1
        single = [explain(subject, text, Token(token, first + i)).map for i, token in enumerate(said)]
        assert torch.allclose(whole.map, sum(single), atol=1e-5)
        assert parts[0].words(0) != parts[2].words(0)


@pytest.mark.parametrize("side, name", [*((side, name) for side in ("left", "right") for name in MODELS
                                          if (side, name) != ("left", "bart"))])  # it has no positions to shift
def test_answers_of_a_batch_are_those_of_its_rows(name, side):
    subject = MODELS[name](padding_side=side)
    targets = [Answer(" paris"), Answer(" in the london")]
    r = explain(subject, PROMPTS, targets)
    assert balanced(r)
    for row in range(2):
        alone = explain(subject, PROMPTS[row:row + 1], targets[row])
        assert torch.allclose(alone.value, r.value[row:row + 1], atol=1e-6) and alone.target == [r.target[row]]
        assert torch.allclose(words(alone), words(r, row), atol=1e-5)
        assert [w for w, _ in alone.words(0)] == [w for w, _ in r.words(row)]
        own = lambda found: [(token, round(value, 4)) for token, value in found]
        assert own(alone.answered(0)) == own(r.answered(row))


@pytest.mark.parametrize("name", MODELS)
def test_an_answer_beside_other_targets(name):
    subject = MODELS[name]()
    r = explain(subject, PROMPTS, [Answer(" paris in"), " bob"])
    alone = explain(subject, PROMPTS[1:], " bob")
    assert torch.allclose(r.value[1:], alone.value) and torch.allclose(words(r, 1), words(alone), atol=1e-5)
    assert r.answered(1) == []


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("a, b", [(" paris", " london"), (" paris in london", " bob")], ids=["equal", "unlike"])
def test_a_contrast_of_answers_is_the_difference(name, a, b):
    subject = MODELS[name]()
    for measure in ("logprob", "logit"):
        one, other = Answer(a, measure=measure), Answer(b, measure=measure)
        r = explain(subject, PROMPTS, Contrast(one, other))
        first, second = explain(subject, PROMPTS, one), explain(subject, PROMPTS, other)
        assert torch.allclose(r.value, first.value - second.value, atol=1e-5) and balanced(r)
        for row in range(2):
            assert torch.allclose(words(r, row), words(first, row) - words(second, row), atol=1e-5)
            assert [w for w, _ in r.words(row)] == PROMPTS[row].split()
        books = [absorbed(one.ledger) for one in (r, first, second)]
        for line in {*books[0], *books[1], *books[2]}:
            whole, *parts = (one.get(line, torch.zeros(2, dtype=torch.float64)) for one in books)
            assert torch.allclose(whole, parts[0] - parts[1], atol=1e-6), line
        alone = explain(subject, PROMPTS[1:], Contrast(one, other))
        assert torch.allclose(words(r, 1), words(alone), atol=1e-5)
        assert torch.allclose(r.map, explain(subject, PROMPTS, Contrast(one, other), batch_size=1).map, atol=1e-5)


def test_what_a_contrast_says_of_its_answers():
    r = explain(gpt2(), PROMPTS[:1], Contrast(Answer(" paris in london"), Answer(" bob")))
    said = r.answered(0)
    assert [token for token, _ in said] == ["\u0120paris", "\u0120in", "\u0120london", "\u0120bob"]
    assert said[0][1] != 0 and said[1][1] != 0 and said[2][1] == said[3][1] == 0  # the last ones are read by nobody
    assert r.target == ["log P of ' paris in london' - log P of ' bob'"]
    total = words(r).sum() + sum(v for _, v in said) + sum(v for _, v in r.specials(0))
    assert torch.allclose(total.double(), r.ledger.input[0], atol=1e-5)


def test_rows_of_one_and_of_two_answers():
    subject = gpt2()
    targets = [Contrast(Answer(" paris"), Answer(" bob in")), Answer(" paris in")]
    r = explain(subject, PROMPTS, targets)
    for row in range(2):
        alone = explain(subject, PROMPTS[row:row + 1], targets[row])
        assert torch.allclose(alone.value, r.value[row:row + 1], atol=1e-5) and alone.target == [r.target[row]]
        assert torch.allclose(words(alone), words(r, row), atol=1e-5)
    assert balanced(r)


def test_an_answer_against_a_token():
    subject = gpt2()
    r = explain(subject, PROMPTS, Contrast(Answer(" paris in", measure="logit"), Token(" bob")))
    first, second = (explain(subject, PROMPTS, one) for one in (Answer(" paris in", measure="logit"), Token(" bob")))
    assert torch.allclose(r.value, first.value - second.value, atol=1e-5)
    assert torch.allclose(words(r, 0), words(first, 0) - words(second, 0), atol=1e-5)


@pytest.mark.parametrize("side, name", [*((side, name) for side in ("left", "right") for name in MODELS
                                          if (side, name) != ("left", "bart"))])  # it has no positions to shift
def test_the_model_writes_the_answer_itself(name, side):
    subject = MODELS[name](padding_side=side)
    r = explain(subject, PROMPTS, Answer(length=4))
    for row, prompt in enumerate(PROMPTS):
        own, said = subject.tokenizer(prompt)["input_ids"], []
        for _ in range(4):  # the likeliest token, four times
            if name in ("t5", "bart"):
                z = subject.model(input_ids=torch.tensor([own]), decoder_input_ids=torch.tensor([[0, *said]])).logits
            else:
                z = subject.model(torch.tensor([own + said])).logits
            said.append(int(z[0, -1].argmax()))
        said = said[:said.index(3)] if 3 in said else said
        given = explain(subject, [prompt], Answer(tuple(said)))
        assert torch.allclose(given.value, r.value[row:row + 1], atol=1e-5) and given.target == [r.target[row]]
        assert torch.allclose(words(given), words(r, row), atol=1e-5)


def test_the_answer_is_taken_from_words_alone_by_the_check():
    subject = llama()
    for target in (Answer(" paris in london"), Contrast(Answer(" paris in london"), Answer(" bob"))):
        r = explain(subject, PROMPTS, target)
        curve = r.check(steps=4, randoms=2)
        assert torch.allclose(curve.value, r.value, atol=1e-5)
        own = subject.prepare(PROMPTS).kwargs
        ids = own["input_ids"].masked_fill(own["input_ids"] > 6, 1)  # all words of the prompt gone, the answer there
        gone = explain(subject, {**own, "input_ids": ids}, target).value
        assert torch.allclose(curve.morf[:, -1], gone, atol=1e-4)
        mask = torch.where(own["input_ids"] > 6, 0, own["attention_mask"])  # hidden, the answer and <s> alone are seen
        hidden = r.check(steps=2, randoms=2, baseline="delete").morf[:, -1]
        assert torch.allclose(hidden, explained(subject, target, own["input_ids"], mask), atol=1e-4)


def explained(subject, target, ids, mask):
    """Values of answers to prompts of which the mask hides tokens, by hand."""
    own = [(1, target)] if isinstance(target, Answer) else [(1, target.a), (-1, target.b)]
    found = torch.zeros(len(ids))
    for sign, one in own:
        said = spelled(subject, one.answer)
        for row, (line, seen) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
            length = sum(subject.prepare(PROMPTS).kwargs["attention_mask"][row].tolist())
            text = torch.tensor([line[:length] + said])
            z = subject.model(text, attention_mask=torch.tensor([seen[:length] + [1] * len(said)])).logits[0]
            z = z[length - 1:length - 1 + len(said)].log_softmax(-1)
            found[row] += sign * z[torch.arange(len(said)), said].sum().item()
    return found


SOME = ("rollout", "integrated-gradients", "gradient", "attnlrp", "generic-attention")


@pytest.mark.parametrize("method", [
    method if method in SOME else pytest.param(method, marks=pytest.mark.slow)
    for method in relprop.METHODS if method != "deeplift"])  # which does not apply to these models
def test_every_method_explains_answers(method):
    subject = gpt2()
    for target in (Answer(" paris in"), Contrast(Answer(" paris in"), Answer(" bob"))):
        r = explain(subject, PROMPTS, target, method=method)
        assert words(r).abs().sum() > 0 and r.rows == 2
    table = relprop.compare(subject, PROMPTS, target, methods=[method], steps=2, randoms=2).table()
    assert table["area"].notna().all()


def test_latents_and_files_of_an_answer(tmp_path):
    subject = gpt2()
    r = explain(subject, PROMPTS, Answer(" paris in"), at=["L0.attn.H0", "L1@-1"])
    assert r.at("L0.attn.H0").shape == r.map.shape and r.at("L1@-1").shape == (2,)
    r.save(tmp_path / "a.json")
    r.save(tmp_path / "a.safetensors")
    for path in tmp_path.iterdir():
        again = relprop.open(path)
        assert again.answered(1) == r.answered(1) and again.words(0) == r.words(0)
    both = explain(subject, PROMPTS, Contrast(Answer(" paris in"), Answer(" bob")), at=["L0.attn.H0"])
    assert both.at("L0.attn.H0").shape[:2] == (2, 2)  # rows, sequences
    assert torch.allclose(both.at("L1@1"), explain(subject, PROMPTS, Contrast(Answer(" paris in"), Answer(" bob")),
                                                   at="L1@1").at("L1@1"))


def test_what_stands_apart_from_the_words_has_its_share(tmp_path):
    """Special tokens, the answer, and a first token that is a word: on each of them models park attention."""
    from relprop.view import words as drawn

    subject = gpt2()
    r = explain(subject, PROMPTS, Answer(" paris in"))
    for row in range(2):
        size = {"words": 0.0, "special tokens": 0.0, "answer": 0.0}
        for t, value in enumerate(r.map[row].abs().tolist()):
            said, word = r.units.answers[row][t], r.units.word_ids[row][t]
            size["answer" if said else "special tokens" if word is None else "words"] += value
        found = r.shares(row)
        assert found == pytest.approx({name: value / sum(size.values()) for name, value in size.items()})
        assert sum(found.values()) == pytest.approx(1) and found["special tokens"] > 0
    told = dict(drawn.aside(r, 0))
    assert [name.rstrip("0123456789. %") for name in told] == ["special tokens", "answer"]
    said = next(boxes for name, boxes in told.items() if name.startswith("answer"))
    assert [one.rsplit(" ", 1)[0].lstrip("\u0120\u2423_ ") for one in said] == ["paris", "in"]
    page = r.save(tmp_path / "a.html").read_text()
    assert f"answer {100 * r.shares(0)['answer']:.1f} %" in page and "special tokens" in page
    r.save(tmp_path / "a.png")
    bare = explain(gpt2(begins=False), PROMPTS)  # no <s> in front
    first = bare.map[0].abs()
    assert bare.shares(0) == pytest.approx({"words": 1.0, "special tokens": 0.0,
                                            "first token": float(first[0] / first.sum())})
    assert drawn.aside(bare, 0)[-1][0].startswith("first token")


def test_answers_are_outcomes():
    subject = gpt2()
    base, other = "alice was born in", "bob was born in"
    for target in (Answer(" paris in"), Contrast(Answer(" paris in"), Answer(" dog"))):
        found = relprop.effects(subject, base, other, target, at="L*.attn.H*", kind=["total", "indirect"])
        values = [explain(subject, [text], target).value.double() for text in (base, other)]
        assert torch.allclose(found.total.flatten().double(), values[1] - values[0], atol=1e-5)
        assert found.indirect.abs().max() > 0 and "log P of ' paris in'" in found.outcome
    guess = relprop.effects(subject, base, other, Answer(" paris in"), at="L*.mlp.N*", estimate="attribution", verify=3)
    assert guess.about["estimate"]["spearman"] > 0.5
    written = explain(subject, [base], Answer(length=3))
    kept = relprop.effects(subject, base, other, Answer(length=3), kind="total")  # that of the base, in both runs
    said = tuple(int(i) for i in _generated(subject, base, 3))
    values = [explain(subject, [text], Answer(said)).value.double() for text in (base, other)]
    assert torch.allclose(values[0], written.value.double())
    assert torch.allclose(kept.total.flatten().double(), values[1] - values[0], atol=1e-5)


def _generated(subject, prompt, length):
    own = subject.tokenizer(prompt)["input_ids"]
    return subject.model.generate(torch.tensor([own]), attention_mask=torch.ones(1, len(own)), max_new_tokens=length,
                                  do_sample=False, pad_token_id=0)[0, len(own):].tolist()


def test_what_tokens_make_up_of_an_answer():
    """Decomposition, forward: all of the input is all of the value."""
    subject = gpt2()
    found = relprop.decompose(subject, PROMPTS[:1], source=["embed"], target=Answer(" paris in", measure="logit"))
    r = explain(subject, PROMPTS[:1], Answer(" paris in", measure="logit"))
    assert torch.allclose(found.total.flatten().float(), r.value, atol=1e-5) and found.target == r.target
    with pytest.raises(ValueError, match="is asked one by one; give one Answer"):
        relprop.decompose(subject, PROMPTS[:1], source=["embed"], target=Contrast(Answer(" paris"), Answer(" bob")))


def test_a_chat_is_its_messages():
    """What the template puts around the messages is no word of theirs."""
    subject = llama(chat=True)
    chat = [{"role": "user", "content": "who was born in paris ?"}]
    r = explain(subject, chat, Answer(" alice was here"))
    assert [word for word, _ in r.words(0)] == ["who", "was", "born", "in", "paris", "?"]
    text = subject.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    own = subject.tokenizer(text, add_special_tokens=False)["input_ids"]
    z = subject.model(torch.tensor([own + spelled(subject, " alice was here")])).logits[0, len(own) - 1:-1]
    expected = z.log_softmax(-1)[torch.arange(3), spelled(subject, " alice was here")].sum()
    assert torch.allclose(r.value.double(), expected, atol=1e-5) and balanced(r)
    assert "<|user|>" in [token for token, _ in r.specials(0)]
    longer = [{"role": "user", "content": "good day"}, {"role": "model", "content": "good day bob"}, *chat]
    several = explain(subject, [chat, longer], Answer(" alice"))
    assert several.rows == 2 and [w for w, _ in several.words(1)][:5] == ["good", "day", "good", "day", "bob"]
    assert torch.allclose(words(several), words(explain(subject, chat, Answer(" alice"))), atol=1e-5)


@pytest.mark.parametrize("target, said", [
    (Answer(" paris in", part=2), "the part 2 lies outside of the answer, which has 2 tokens"),
    (Answer(" paris in", part=(1, 3)), r"the part \(1, 3\) lies outside of the answer"),
    (Answer(" paris in", part=(1, 1)), r"the part \(1, 1\) lies outside of the answer"),
    (Answer(" paris in", part=-3), "the part -3 lies outside of the answer"),
    (Answer(" paris in", part="london"), "'london' is not a part of the answer 'paris in'"),
    (Answer(()), "an answer without a token"),
    (Answer((999,)), "no token 999 in .*, whose vocabulary has"),
    (Answer(""), "the tokenizer finds no token in ''"),
    (Answer(" paris", measure="odds"), "measured by logprob or logit, not by 'odds'"),
    (Answer(" paris" * 40), "have 45 tokens, .* takes 40"),
    (Span("paris"), "no start logits"),
])
def test_answers_that_cannot_be(target, said):
    with pytest.raises((ValueError, TypeError), match=said):
        explain(gpt2(), PROMPTS[:1], target)


def test_several_tokens_in_the_place_of_one():
    with pytest.raises(ValueError, match=r"' paris in' is 2 tokens, .* or Answer\(' paris in'\) for all of them"):
        explain(gpt2(), PROMPTS[:1], " paris in")


def test_an_answer_of_a_model_that_does_not_write():
    with pytest.raises(ValueError, match="an answer is written by a language model, and the task here is 'text-class"):
        explain("reviews-bert", "A fine film.", Answer(" yes"))
