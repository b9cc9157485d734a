"""Targets read the entry they name, of their own row, wherever padding is."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from relprop.target import Class, Contrast, Function, Probability, Target, Targets, Token, Vocabulary, logits, resolve
from relprop.tokens import Batch, TensorUnits, from_ids

LABELS = ("cat", "dog", "tench, Tinca tinca")


@pytest.fixture
def classes(seed):
    """Logits of three rows and three classes, as transformers returns them."""
    return SimpleNamespace(logits=torch.randn(3, 3, dtype=torch.float64, requires_grad=True))


@pytest.fixture
def tokens(seed):
    """Logits of two rows, four positions and nine tokens; one row is padded."""
    return SimpleNamespace(logits=torch.randn(2, 4, 9, requires_grad=True))


def plain(rows):
    return Batch((), {}, rows, TensorUnits((rows, 5)))


def text(mask):
    """A batch of token ids with this padding."""
    mask = torch.tensor(mask)
    ids = torch.arange(1, mask.numel() + 1).reshape(mask.shape) * mask
    return Batch((), {"input_ids": ids}, len(mask), from_ids(ids, mask), None)


def shared_tokenizer(folder):
    from conftest import SHARED
    from transformers import AutoTokenizer

    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}: real tokenizers do not ship with relprop")
    return AutoTokenizer.from_pretrained(SHARED / folder)


@pytest.mark.parametrize(
    "spec, index", [(1, 1), ("dog", 1), ("DOG", 1), ("Tinca tinca", 2), (Class("cat"), 0), (torch.tensor(2), 2)]
)
def test_one_target_for_all_rows(classes, spec, index):
    targets = resolve(spec, rows=3, labels=LABELS)
    assert torch.equal(targets.value(classes, plain(3)), classes.logits[:, index])
    assert targets.names(classes, plain(3)) == [LABELS[index]] * 3
    assert targets.fixed(classes, plain(3)) == targets


def test_a_target_a_row(classes):
    targets = resolve(["dog", 0, Contrast("cat", 1)], rows=3, labels=LABELS)
    z = classes.logits
    assert torch.equal(targets.value(classes, plain(3)), torch.stack([z[0, 1], z[1, 0], z[2, 0] - z[2, 1]]))
    assert targets.names(classes, plain(3)) == ["dog", "cat", "cat - dog"]
    taken = targets.take(torch.tensor([2, 0]))
    assert taken.names(classes, plain(3).take([2, 0])) == ["cat - dog", "dog"]


def test_rows_do_not_read_each_other(classes):
    targets = resolve(["dog", None, "dog"], rows=3, labels=LABELS)
    for row in range(3):
        (g,) = torch.autograd.grad(targets.value(classes, plain(3))[row], classes.logits)
        assert g[row].abs().sum() == 1 and g.abs().sum() == 1


def test_prediction_stays_fixed(classes):
    targets = resolve(None, rows=3, labels=LABELS)
    best = classes.logits.argmax(1).tolist()
    assert torch.equal(targets.value(classes, plain(3)), classes.logits.amax(1))
    fixed = targets.fixed(classes, plain(3))
    assert fixed.targets == tuple(map(Class, best))
    turned = SimpleNamespace(logits=-classes.logits)
    assert torch.equal(fixed.value(turned, plain(3)), -classes.logits.amax(1))
    assert targets.names(classes, plain(3)) == [LABELS[index] for index in best]


@pytest.mark.parametrize("multilabel", [False, True])
def test_probability(classes, multilabel):
    of = Vocabulary(LABELS, multilabel=multilabel).targets(Probability("dog"), 3)
    z = classes.logits
    expected = z.sigmoid() if multilabel else z.softmax(1)
    assert torch.equal(of.value(classes, plain(3)), expected[:, 1])
    assert of.names(classes, plain(3)) == ["P(dog)"] * 3
    best = Vocabulary(LABELS, multilabel=multilabel).targets(Probability(), 3)
    assert torch.equal(best.value(classes, plain(3)), expected.amax(1))
    assert torch.equal(best.fixed(classes, plain(3)).value(classes, plain(3)), expected.amax(1))
    other = resolve(Probability(1, "softmax"), rows=3)
    assert torch.equal(other.value(classes, plain(3)), z.softmax(1)[:, 1])


def test_a_single_logit_is_a_sigmoid():
    z = torch.tensor([[0.3], [-2.0]])
    assert torch.equal(resolve(Probability(0), rows=2).value(z, plain(2)), z.sigmoid()[:, 0])
    assert torch.equal(resolve(None, rows=2).value(z[:, 0], plain(2)), z[:, 0])


def test_function(classes):
    def margin(output):
        return output.logits[:, 0] - output.logits[:, 1:].logsumexp(1)

    targets = resolve([margin, "cat", Function(margin, "spread")], rows=3, labels=LABELS)
    expected = margin(classes)
    assert torch.equal(targets.value(classes, plain(3)), torch.stack([expected[0], classes.logits[1, 0], expected[2]]))
    assert targets.names(classes, plain(3)) == ["margin", "cat", "spread"]


def test_a_target_of_ones_own(classes):
    @dataclass(frozen=True)
    class Norm(Target):
        power: float

        def value(self, reading):
            return reading.classes().norm(self.power, dim=1)

    targets = resolve([Norm(2), "cat", Norm(2)], rows=3, labels=LABELS)
    assert torch.equal(targets.value(classes, plain(3))[[0, 2]], classes.logits.norm(2, dim=1)[[0, 2]])
    assert "power=2" in targets.names(classes, plain(3))[0]


@pytest.mark.parametrize("mask", [[[1, 1, 1, 1], [1, 1, 0, 0]], [[1, 1, 1, 1], [0, 0, 1, 1]]], ids=["right", "left"])
def test_positions_do_not_count_padding(tokens, mask):
    first = mask[1].index(1)
    batch = text(mask)
    for position, at in [(None, first + 1), (-1, first + 1), (-2, first), (0, first), (1, first + 1)]:
        targets = Targets((Token(3), Token(5, position)), Vocabulary(task="text-generation"))
        assert targets.value(tokens, batch).tolist() == [tokens.logits[0, 3, 3], tokens.logits[1, at, 5]]
        fixed = targets.fixed(tokens, batch)
        assert fixed.targets == (Token(3, 3), Token(5, at - first))
        assert torch.equal(fixed.value(tokens, batch), targets.value(tokens, batch))
    for position in (2, -3):
        with pytest.raises(
            ValueError, match=rf"no position {position} in row 1, which has 2 tokens; the rest is padding"
        ):
            Targets((Token(3), Token(5, position)), Vocabulary()).value(tokens, batch)


def test_prediction_of_a_token(tokens):
    batch = text([[1, 1, 1, 1], [1, 1, 0, 0]])
    targets = resolve(None, rows=2, tokenizer=None)
    fixed = targets.fixed(tokens, batch)
    z = torch.stack([tokens.logits[0, 3], tokens.logits[1, 1]])
    assert fixed.targets == (Token(z[0].argmax().item(), 3), Token(z[1].argmax().item(), 1))
    assert torch.equal(fixed.value(tokens, batch), z.amax(1)) and torch.equal(targets.value(tokens, batch), z.amax(1))
    assert fixed.names(tokens, batch)[0] == f"token {z[0].argmax()}"
    p = resolve(Probability(Token(2)), rows=2).value(tokens, batch)
    assert torch.equal(p, z.softmax(1)[:, 2])


def test_where_a_masked_model_answers(tokens):
    batch = text([[1, 1, 1, 1], [0, 1, 1, 1]])
    batch = Batch((), batch.kwargs, 2, batch.units, None, torch.tensor([1, 2]))
    targets = Vocabulary(task="fill-mask").targets(7, 2)
    assert targets.value(tokens, batch).tolist() == [tokens.logits[0, 1, 7], tokens.logits[1, 2, 7]]
    assert targets.fixed(tokens, batch).targets == (Token(7, 1), Token(7, 1))
    several = Batch((), batch.kwargs, 2, batch.units, None, torch.tensor([1, -1]))
    with pytest.raises(ValueError, match="row 1 has no mask token, or several"):
        targets.value(tokens, several)
    assert Targets((Token(7, 0),) * 2, Vocabulary()).value(tokens, several).tolist()[0] == tokens.logits[0, 0, 7]


def test_tokens_by_text():
    gpt2 = Vocabulary(tokenizer=shared_tokenizer("data/gpt2-tokenizer"))
    assert gpt2.token(" Mary") == 5335 == gpt2.token("\u0120Mary")
    assert gpt2.target(" Mary") == Token(5335) and gpt2.target(5335) == Token(5335)
    assert gpt2.name(5335, token=True) == "' Mary'"
    with pytest.raises(ValueError, match=r"3 tokens, \['Sch', 'rod', 'inger'\], where one is needed; give one of them"):
        gpt2.token("Schrodinger")
    with pytest.raises(ValueError, match=r"'Schro' is 2 tokens, .*; with a space before it, \" Schro\", it is one"):
        gpt2.token("Schro")
    llama = Vocabulary(tokenizer=shared_tokenizer("models/stories260k"))
    assert llama.token("Lily") == llama.token(" Lily") == llama.token("\u2581Lily")
    bert = Vocabulary(tokenizer=shared_tokenizer("models/minilm-sentiment"))
    assert bert.token("Film") == bert.token("film") != bert.token("##film")
    with pytest.raises(ValueError, match="no token '\U0001f984' in the vocabulary"):
        bert.token("\U0001f984")


def test_half_precision_is_widened():
    z = torch.randn(2, 3, dtype=torch.bfloat16)
    assert logits(z).dtype == torch.float32 and resolve(0, rows=2).value(z, plain(2)).dtype == torch.float32
    assert logits(z.double()).dtype == torch.float64


def test_logits_are_found():
    z = torch.randn(2, 3)
    for output in (z, (z, None), [z], {"logits": z}, SimpleNamespace(logits=z)):
        assert logits(output) is z
    with pytest.raises(
        TypeError, match="no logits in an output of type dict .*last_hidden_state.*a function of the output"
    ):
        logits({"last_hidden_state": z})
    with pytest.raises(TypeError, match="NoneType"):
        logits(None)


@pytest.mark.parametrize(
    "spec, error, message",
    [
        ("dgo", ValueError, r"no label 'dgo'; there are cat, dog, tench, Tinca tinca; did you mean 'dog'\?"),
        (3, ValueError, r"no class index 3; the model has 0 to 2 \(cat, dog"),
        (-1, ValueError, "no class index -1"),
        ([0, 1], ValueError, "2 targets for 3 rows; give one target, or a list with one a row"),
        ([], ValueError, "0 targets for 3 rows"),
        (1.5, TypeError, r"not float \(1.5\)"),
        (True, TypeError, "not True"),
        (Probability(Contrast(0, 1)), ValueError, "a probability is of a class or a token"),
        (Probability(0, "sofmax"), ValueError, "'sofmax'"),
        (Token("cat"), ValueError, "no tokenizer to look up token 'cat'"),
    ],
)
def test_bad_targets(spec, error, message):
    with pytest.raises(error, match=message):
        resolve(spec, rows=3, labels=LABELS)


def test_labels_that_are_not_there():
    with pytest.raises(ValueError, match="the classes of this model have no labels; give the index"):
        resolve("cat", rows=1)
    with pytest.raises(ValueError, match=r"label 'crane' stands for classes \[0, 1\]"):
        resolve("crane", rows=1, labels=("crane", "crane"))
    with pytest.raises(ValueError, match="and 980 more; did you mean 'n999'"):
        resolve("n9999", rows=1, labels=[f"n{i}" for i in range(1000)])


def test_outputs_that_do_not_fit(classes, tokens):
    with pytest.raises(ValueError, match="no class index 5; the model has 0 to 2"):
        resolve(5, rows=3).value(classes, plain(3))
    with pytest.raises(ValueError, match=r"\(2, 4, 9\) are not \(rows, classes\); say which position"):
        resolve(5, rows=2).value(tokens, plain(2))
    with pytest.raises(ValueError, match=r"\(3, 3\) are not \(rows, positions, tokens\)"):
        resolve(Token(1), rows=3).value(classes, plain(3))
    with pytest.raises(ValueError, match="no token id 9; the model has 0 to 8"):
        resolve(Token(9), rows=2).value(tokens, plain(2))
    with pytest.raises(ValueError, match="3 targets for 2 rows"):
        resolve(0, rows=3).value(classes, plain(2))
    with pytest.raises(ValueError, match="the output has 3 rows, the input 2"):
        resolve(0, rows=2).value(classes, plain(2))
    with pytest.raises(
        ValueError, match=r"<lambda> must return a floating tensor of shape \(3,\), .* not torch.float64 \(3, 3\)"
    ):
        resolve(lambda output: output.logits, rows=3).value(classes, plain(3))
    with pytest.raises(ValueError, match="say which position"):
        resolve(None, rows=2, labels=LABELS).value(tokens, plain(2))
