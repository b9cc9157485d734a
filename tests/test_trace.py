"""The interception leaves a model as it is: same output, same state afterwards, however it is called."""
from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from written import F64, D, Written, closes, content, lived_in, run, same, second, state, tokens, torch_state

import relprop
from relprop import ops
from relprop.composite import NAMES, get
from relprop.errors import IndependentOutput, UnruledOp
from relprop.ops import matmul, table
from relprop.relevance import propagate

composites = pytest.mark.parametrize("composite", NAMES)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers", "ignore::UserWarning:timm")


# -- giving back -------------------------------------------------------------------------------------------------------

def test_the_state_sees_a_change():
    model = Written(lambda self, x: self.head(x))
    before = state(model)
    assert state(model) == before
    for change in (lambda: model.train(), lambda: model.head.weight.data.add_(1), lambda: torch.rand(1),
                   lambda: model.head.register_forward_hook(print), lambda: model.head.weight.requires_grad_(False),
                   lambda: setattr(model.head.bias, "grad", torch.ones(3, dtype=F64))):
        before = state(model)
        change()
        assert state(model) != before


@pytest.mark.parametrize("composite", ["attnlrp", "cp-lrp"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_given_back(name, composite):
    """And explained in eval mode: the map is that of the model in eval mode."""
    model, family = lived_in(FAMILIES[name].model()), FAMILIES[name]
    args, kwargs = family.inputs()
    before = state(model)
    found = propagate(model, args, kwargs, family.value, composite)
    assert state(model) == before
    expected = propagate(model.eval(), args, kwargs, family.value, composite)
    assert all(torch.equal(found.relevance[key], r) for key, r in expected.relevance.items())


class Failing(torch.autograd.Function):
    """The identity, with an error on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise ZeroDivisionError("on the way back")


def fail(module: nn.Module, args: Any, output: Any) -> Any:
    raise ZeroDivisionError("on the way")


def fail_back(module: nn.Module, args: Any, output: Any) -> Any:
    first = output[0] if isinstance(output, tuple) else output
    with torch._C.DisableTorchFunction():
        first = Failing.apply(first)
    return (first, *output[1:]) if isinstance(output, tuple) else first


@pytest.mark.parametrize("failure", [fail, fail_back], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ["bert", "llama", "gemma3", "timm-vit", "timm-swin", "torch-encoder"])
def test_a_model_that_fails_is_given_back(name, failure):
    model, family = lived_in(FAMILIES[name].model()), FAMILIES[name]
    args, kwargs = family.inputs()
    middle = [module for module in model.modules() if isinstance(module, nn.Linear)][-2]
    handle = middle.register_forward_hook(failure)
    before = state(model)
    with pytest.raises(ZeroDivisionError, match="on the way"):
        propagate(model, args, kwargs, family.value, "attnlrp")
    assert state(model) == before
    handle.remove()
    propagate(model, args, kwargs, family.value, "attnlrp")  # and works again


@pytest.mark.parametrize("error, forward", [
    (UnruledOp, lambda self, x: self.head(torch.cumprod(self.first(x), 1)).sum(1)),
    (IndependentOutput, lambda self, x: self.head(x.detach()).sum(1)),
    (ValueError, lambda self, x: self.head(x).sum(1) / 0)])
def test_a_model_that_cannot_be_explained_is_given_back(error, forward):
    model = lived_in(Written(forward))
    before = state(model)
    with pytest.raises(error):
        propagate(model, (tokens(),), {}, second)
    assert state(model) == before


def test_inputs_are_given_back():
    x = tokens().requires_grad_()
    x.grad = torch.ones_like(x)
    before = content(x), content(x.grad), x.requires_grad, x._version
    run(lambda self, x: self.head(x.mul_(2).add_(1)).sum(1), x)
    assert (content(x), content(x.grad), x.requires_grad, x._version) == before


def test_a_module_that_draws_random_numbers_is_not_drawn_from_in_advance():
    """Whether a module is an activation is found by trying it, which must not move the model's random numbers on."""
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    torch.manual_seed(0)
    model = Written(lambda self, x: self.head(self.noise(x)).sum(1))
    model.noise = Noisy()
    torch.manual_seed(0)
    expected = model(tokens())
    torch.manual_seed(0)
    assert torch.equal(run(model).output, expected)


# -- how models are called ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["bert", "llama", "hf-vit", "timm-vit", "torchvision-vit", "torch-encoder"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, partial(torch.set_grad_enabled, False)])
def test_callers_without_gradients(name, mode):
    family = FAMILIES[name]
    expected = propagate(model(name), *family.inputs(), family.value)
    with mode():
        args, kwargs = family.inputs()  # made in here, as a data loader would
        before = torch_state()
        found = propagate(model(name), args, kwargs, family.value)
        assert torch_state() == before
    assert all(torch.equal(found.relevance[key], r) for key, r in expected.relevance.items())
    assert torch.equal(found.ledger.input, expected.ledger.input)


@composites
@pytest.mark.parametrize("name", ["bert", "llama", "gemma3", "hf-vit", "timm-vit"])
def test_callers_with_autocast(name, composite):
    """The model computes as it does for them, and the books are as exact as that."""
    family = FAMILIES[name]
    args, kwargs = family.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            expected = family.value(model(name)(*args, **kwargs))
        before = torch_state()
        found = propagate(model(name), args, kwargs, family.value, composite)
        assert torch_state() == before
    assert torch.equal(found.value, expected)
    assert all(r.dtype == torch.float32 and r.abs().max() > 0 for r in found.relevance.values())


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        made = FAMILIES["bert"].model()
    with pytest.raises(ValueError, match="'bert.*' was made under torch.inference_mode"):
        propagate(made, *FAMILIES["bert"].inputs(), FAMILIES["bert"].value)


def test_a_model_with_its_own_blocks_without_gradients():
    """What is computed there is a constant, as it is for autograd."""
    def forward(self, x):
        with torch.no_grad():
            gate = torch.cumprod(x, 1)  # an op that has no rule
        return self.head(x * gate).sum(1)

    found = run(forward)
    assert closes(found)


def test_several_inputs():
    """Each floating input has a map, and ids beside them one through their embedding; a mask is not explained."""
    def forward(self, x, *, input_ids, extra, attention_mask):
        states = self.norm(x + self.table(input_ids)) + self.second(extra)
        return {"logits": self.head((states * attention_mask[..., None]).sum(1)), "more": [states]}

    model = Written(forward)
    model.table = nn.Embedding(10, D).to(F64)
    ids = torch.randint(10, (2, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1.0] * 5, [1.0] * 3 + [0.0] * 2], dtype=F64)
    named = {"input_ids": ids, "extra": tokens() + 1, "attention_mask": mask}
    found = run(model, tokens(), named=named, value=lambda output: output["logits"][:, 1])
    assert set(found.relevance) == {"0", "input_ids", "extra"} and closes(found)
    assert same(sum(r.flatten(1).sum(1) for r in found.relevance.values()), found.ledger.input)
    assert (found.relevance["extra"][1, 3:] == 0).all() and (found.relevance["extra"][1, :3] != 0).all()


def test_word_embeddings_that_are_written_to():
    """The table is looked up twice and scaled in place; both are the words, and the model's table stays as it is."""
    def forward(self, input_ids):
        x = self.table(input_ids)
        x *= 2
        x += self.norm(self.table(input_ids))
        return self.head(x).sum(1)

    model = Written(forward)
    model.table = nn.Embedding(10, D).to(F64)
    ids = torch.randint(10, (2, 5), generator=torch.Generator().manual_seed(2))
    before = state(model)
    found = propagate(model, (), {"input_ids": ids}, second, "cp-lrp")
    assert state(model) == before and closes(found)
    assert same(sum(r.flatten(1).sum(1) for r in found.relevance.values()), found.ledger.input)


def test_nested_modules_and_shared_ones():
    """A module that is called twice, and one inside another: the path in an error is that of the innermost."""
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cumprod(x, 1)

    model = Written(lambda self, x: self.head(self.blocks(self.first(self.first(x)))).sum(1))
    model.blocks = nn.Sequential(nn.Identity(), nn.ModuleDict({"deep": Inner()}))
    model.blocks[1].forward = lambda x: model.blocks[1]["deep"](x)
    with pytest.raises(UnruledOp, match=r"torch\.cumprod in module 'blocks\.1\.deep' \(Inner\)"):
        run(model)
    assert closes(run(lambda self, x: self.head(self.first(self.first(x))).sum(1)))


# -- gradient checkpointing --------------------------------------------------------------------------------------------

def block(self: nn.Module, x: Tensor) -> Tensor:
    x = x + self.first(F.gelu(self.norm(x)))
    return x + F.scaled_dot_product_attention(x, self.second(x), x)


@composites
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(composite, reentrant):
    def plain(self, x):
        return self.head(block(self, block(self, self.first(x)))).sum(1)

    def checkpointed(self, x):
        x = self.first(x)
        for _ in range(2):
            x = checkpoint(partial(block, self), x, use_reentrant=reentrant)
        return self.head(x).sum(1)

    expected, model = run(plain, composite=composite), Written(checkpointed)
    before = state(model)
    found = run(model, composite=composite)
    assert state(model) == before and closes(found)
    assert torch.equal(found.relevance["0"], expected.relevance["0"])
    assert found.ledger.absorbed.keys() == expected.ledger.absorbed.keys()
    assert all(same(t, expected.ledger.absorbed[key], 1e-9) for key, t in found.ledger.absorbed.items())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "hf-vit", "timm-vit"])
def test_checkpointing_of_the_libraries(name, reentrant):
    """timm checkpoints in eval mode too."""
    family, checkpointed = FAMILIES[name], FAMILIES[name].model().train()
    if name.startswith("timm"):
        checkpointed.set_grad_checkpointing()
    else:
        checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = state(checkpointed)
    found = propagate(checkpointed, *family.inputs(), family.value)
    assert state(checkpointed) == before
    expected = propagate(model(name), *family.inputs(), family.value)
    assert all(torch.equal(found.relevance[key], r) for key, r in expected.relevance.items())


# -- attention ---------------------------------------------------------------------------------------------------------

def attend(self: nn.Module, x: Tensor, *, groups: int, explicit: bool, causal: bool) -> Tensor:
    """Four query heads of two features; each key head serves `groups` of them."""
    q, k, v = (F.linear(x, W).unflatten(-1, (-1, 2)).transpose(1, 2) for W in (
        self.first.weight, self.second.weight[:D // groups], self.head.weight.new_ones(D // groups, D).tril()))
    if not explicit:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=groups > 1)
    else:
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        scores = q @ k.transpose(-2, -1) / 2 ** 0.5
        hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
        mixed = torch.softmax(scores.masked_fill(hidden, -torch.inf) if causal else scores, -1) @ v
    return self.head(mixed.transpose(1, 2).flatten(2)).sum(1)


STEPWISE = get("attnlrp").but("stepwise", rules={"matmul": partial(matmul.epsilon, eps=1e-9)})


@pytest.mark.parametrize("composite", [*NAMES, STEPWISE], ids=lambda c: getattr(c, "name", c))
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_fused_attention_is_the_explicit_one(groups, causal, composite):
    """Also with grouped queries, and where the rule needs the fused kernel opened."""
    fused, explicit = (run(partial(attend, groups=groups, explicit=explicit, causal=causal), composite=composite)
                       for explicit in (False, True))
    plain = Written(partial(attend, groups=groups, explicit=False, causal=causal))(tokens())
    assert closes(fused) and closes(explicit)
    assert same(fused.relevance["0"], explicit.relevance["0"], 1e-9)
    assert same(fused.output, plain, 1e-5) if composite is STEPWISE else torch.equal(fused.output, plain)


# -- ops without a rule ------------------------------------------------------------------------------------------------

def cumulated(self, x):
    return self.head(torch.cumprod(1 + self.first(x) / 10, 1)).sum(1)


def test_an_op_without_a_rule_names_the_way_out():
    with pytest.raises(UnruledOp) as caught:
        run(cumulated)
    message = str(caught.value)
    assert "torch.cumprod" in message and "Written" in message
    assert "register" in message and "unruled='gradient'" in message


def test_an_op_without_a_rule_may_pass_with_its_gradient():
    found = run(cumulated, unruled="gradient", composite="gradient")
    x = tokens().requires_grad_()
    (g,) = torch.autograd.grad(Written(cumulated)(x)[:, 1].sum(), x)
    (account,) = [name for name in found.ledger.absorbed if "cumprod" in name]
    assert closes(found) and found.ledger.absorbed[account].abs().min() > 0
    assert same(found.relevance["0"], (x * g).detach())


def test_an_op_may_be_registered(monkeypatch):
    monkeypatch.setattr(table, "_TABLE", dict(table._TABLE))
    ops.register(torch.cumprod, "activation", lambda call, x, *args: call.booked(
        "products", [x], lambda x: call.func(x, *args)))
    found = run(cumulated)
    assert closes(found) and found.ledger.absorbed["products"].abs().min() > 0


def test_an_op_that_the_input_does_not_reach_needs_no_rule():
    assert closes(run(lambda self, x: self.head(x + torch.cumprod(self.norm.weight, 0)).sum(1)))


# -- the public face ---------------------------------------------------------------------------------------------------

def logits(self, x):
    return self.head(F.gelu(self.norm(self.first(x)))).sum(1)


def test_explain_takes_a_module_of_ones_own():
    model, x = Written(logits).train(), tokens()
    before = state(model)
    r = relprop.explain(model, x, target=1)
    assert state(model) == before
    assert torch.allclose(r.map, run(logits).relevance["0"].sum(-1).float())
    assert (r.ledger.error <= 1e-9).all()
