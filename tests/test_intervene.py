"""Interventions: what is put somewhere is there, what is put back changes nothing, the model comes back as it was."""
from __future__ import annotations

from functools import cache

import pytest
import torch
from families import FAMILIES, model
from torch import nn
from torch.testing import assert_close

from relprop.errors import RelpropError
from relprop.intervene import Given, Hold, Mean, Noise, Pattern, Resample, Site, Zero, intervened, parts

SOME = ["gpt2", "llama", "bert-eager", "timm-vit", "torch-encoder-sequence-first"]


@cache
def known(name):
    args, kwargs = FAMILIES[name].inputs()
    return parts(model(name), args, kwargs)


def run(name, inputs, interventions=None):
    """A number a row, in a run with these interventions."""
    args, kwargs = inputs
    with torch.no_grad():
        if interventions is None:
            return FAMILIES[name].value(model(name)(*args, **kwargs))
        with intervened(model(name), interventions, known=known(name)):
            return FAMILIES[name].value(model(name)(*args, **kwargs))


def two(name):
    """An input, and another of the same shape."""
    args, kwargs = FAMILIES[name].inputs()
    if args:
        return (args, kwargs), ((args[0].flip(0) * 0.5,), {})
    ids = torch.where(kwargs["input_ids"] == 0, 0, (kwargs["input_ids"] + 5) % 30 + 3)
    return (args, kwargs), ((), {**kwargs, "input_ids": ids})


def given(inputs):
    return inputs[0] or inputs[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_value_put_back_changes_nothing(name):
    """Bit for bit, except that torch's own multi-head attention is one call, which has to be written out."""
    base, other = two(name)
    sites = ["L0.attn.H1", "L1.attn.H*", "L*", "L1.attn.H1.pattern"]
    plain = run(name, base, dict.fromkeys(sites, Noise(0.0)))
    opened = any(isinstance(module, nn.MultiheadAttention) for module in model(name).modules())
    assert_close(plain, run(name, base), rtol=1e-5, atol=1e-6)
    assert opened or torch.equal(plain, run(name, base))
    assert torch.equal(run(name, base, dict.fromkeys(sites, Resample(given(base)))), plain)
    assert torch.equal(run(name, base, dict.fromkeys(sites, Hold())), plain)
    for site in sites:
        assert not torch.equal(run(name, base, {site: Zero()}), plain), site


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_resampled_is_the_other_inputs_run(name):
    base, other = two(name)
    last = f"L{len(known(name).layers) - 1}"
    changed = run(name, base, {last: Resample(given(other))})
    if name not in ("timm-cait",):  # whose last layer changes the class token alone
        assert_close(changed, run(name, other), rtol=1e-5, atol=1e-6)
    assert not torch.equal(changed, run(name, base))


@pytest.mark.parametrize("name", SOME)
def test_the_stream_between_attention_and_mlp_is_read_by_both(name):
    """By the MLP, and by what its output is added to: resampled, all behind it is the other input's run; also where
    something is put elsewhere by sums of its own."""
    base, other = two(name)
    last = f"L{len(known(name).layers) - 1}"
    changed = run(name, base, {f"{last}.mid": Resample(given(other)), f"{last}.in": Noise(0.1)})
    assert_close(changed, run(name, other), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(changed, run(name, base), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SOME)
def test_zero_is_what_a_hook_does(name):
    base, _ = two(name)
    layer = known(name).layers[1]
    module = model(name).get_submodule(layer.path)
    handle = module.register_forward_hook(lambda m, a, o: o * 0 if isinstance(o, torch.Tensor) else (o[0] * 0, *o[1:]))
    hooked = run(name, base)
    handle.remove()
    assert_close(run(name, base, {"L1": Zero()}), hooked)
    assert_close(run(name, base, {"L1": Given(0.0)}), hooked)


@pytest.mark.parametrize("name", SOME)
def test_heads_sum_to_the_attention(name):
    """All heads at zero leave the output projection's bias."""
    base, _ = two(name)
    tap = known(name).layers[0].attention
    module = model(name).get_submodule(tap.path)
    module = getattr(module, "out_proj", module)
    bias = 0.0 if module.bias is None else module.bias
    assert_close(run(name, base, {"L0.attn.H*": Zero()}), run(name, base, {"L0.attn": Given(bias)}))


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("position", [1, -2])
def test_one_position(name, position):
    base, other = two(name)
    padded = base[1].get("attention_mask")
    whole = run(name, base, {"L0.attn.H0": Resample(given(other))})
    here = run(name, base, {f"L0.attn.H0@{position}": Resample(given(other))})
    assert not torch.equal(whole, here) and not torch.equal(here, run(name, base))
    length = 7 if padded is not None else known_length(name)
    lengths = torch.full((3,), length) if padded is None else padded.sum(1)
    align = torch.full((3, length), -1)
    align[torch.arange(3), position % lengths] = (position % lengths)
    assert_close(run(name, base, {"L0.attn.H0": Resample(given(other), align)}), here)


def known_length(name):
    return 17 if name == "timm-vit" else 16


def test_a_pattern_within_a_prompt():
    """Of a causal model, rows and columns of the prompt swapped for its own length are the prompt's run."""
    base, other = two("llama")
    whole = run("llama", base, {"L*.attn": Pattern(given(other))})
    assert_close(run("llama", base, {"L*.attn": Pattern(given(other), within=7)}), whole)
    assert not torch.allclose(run("llama", base, {"L*.attn": Pattern(given(other), within=2)}), whole)
    assert torch.equal(run("llama", base, {"L*.attn": Pattern(given(other), within=0)}), run("llama", base))
    eager = run("llama-eager", base, {"L*.attn": Pattern(given(other), within=4)})
    assert_close(eager, run("llama", base, {"L*.attn": Pattern(given(other), within=4)}))


def test_means():
    base, other = two("gpt2")
    one = {name: value[:1] for name, value in other[1].items()}  # one row, no padding
    with torch.no_grad():
        layer = model("gpt2")(**one, output_hidden_states=True).hidden_states[1]  # (1, T, D)
    assert_close(run("gpt2", base, {"L0": Mean(one)}), run("gpt2", base, {"L0": Given(layer.mean(1, keepdim=True))}))
    assert_close(run("gpt2", base, {"L0": Mean(one, per_position=True)}), run("gpt2", base, {"L0": Given(layer)}))
    padded = {name: torch.cat([value, value]) for name, value in one.items()}
    padded["input_ids"][1, 3:], padded["attention_mask"][1, 3:] = 0, 0
    short = {name: value[:, :3] for name, value in one.items()}
    with torch.no_grad():
        again = model("gpt2")(**short, output_hidden_states=True).hidden_states[1]
    mean = torch.cat([layer[0], again[0]]).mean(0)
    assert_close(run("gpt2", base, {"L0": Mean(padded)}), run("gpt2", base, {"L0": Given(mean)}))


def test_noise_of_a_batch_is_that_of_its_rows():
    base, _ = two("gpt2")
    noisy = run("gpt2", base, {"embed": Noise(0.5, seed=3)})
    alone = [run("gpt2", ((), {name: value[row:row + 1] for name, value in base[1].items()}),
                 {"embed": Noise(0.5, seed=3)}) for row in range(3)]
    assert_close(noisy, torch.cat(alone))
    assert not torch.allclose(noisy, run("gpt2", base, {"embed": Noise(0.5, seed=4)}))


def test_coordinates_are_the_whole():
    base, other = two("gpt2")
    each = run("gpt2", base, {"L0.mlp[*]": Resample(given(other))})
    assert torch.equal(each, run("gpt2", base, {"L0.mlp": Resample(given(other))}))
    first = run("gpt2", base, {"L0.mlp[3]": Resample(given(other))})
    assert not torch.equal(first, each) and not torch.equal(first, run("gpt2", base))


def test_hold_shuts_a_path():
    """What is done below a layer whose output is held changes nothing."""
    base, other = two("gpt2")
    free = run("gpt2", base, {"L0.attn.H0": Zero()})
    held = run("gpt2", base, {"L0.attn.H0": Zero(), "L1": Hold()})
    assert torch.equal(held, run("gpt2", base)) and not torch.equal(free, held)
    assert_close(run("gpt2", other, {"L1": Hold(given(base))}), run("gpt2", base))


def test_each_one_is_counted_and_the_model_comes_back():
    base, _ = two("gpt2")
    one = model("gpt2")
    before = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in one.named_modules()}
    with torch.no_grad(), intervened(one, {"L*.attn.H*": Zero(), "L1.mlp@0": Zero()}) as done:
        one(**base[1])
        one(**base[1])
    assert done == {"L*.attn.H*": 2, "L1.mlp@0": 2}
    with pytest.raises(RuntimeError, match="on purpose"), intervened(one, {"L0": Zero()}):
        one(**base[1])
        raise RuntimeError("on purpose")
    with pytest.raises(ValueError, match="row 0 has 7 positions"), torch.no_grad(), intervened(one, {"L0@9": Zero()}):
        one(**base[1])
    assert before == {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in one.named_modules()}
    assert torch.equal(run("gpt2", base), FAMILIES["gpt2"].value(FAMILIES["gpt2"].model()(**base[1])))


@pytest.mark.parametrize("wanted, error, said", [
    ({"L7": Zero()}, ValueError, "no layer 7"), ({"L0.attn.H5": Zero()}, ValueError, "no H5 in layer 0"),
    ({"attn": Zero()}, ValueError, "is no address"), ({"L0.mlp.pattern": Zero()}, ValueError, "is no address"),
    ({"L0.attn.H1[3]": Zero()}, ValueError, "of a whole part"), ({"L0": 0.0}, TypeError, "expected an intervention"),
    ({"L0": Given(torch.zeros(5))}, ValueError, "a given value of shape"),
    ({"L0": Resample({"input_ids": torch.ones(3, 4).long()})}, ValueError, "make them equal, or give align="),
    ({"L0": Resample("text")}, TypeError, "inputs of an intervention")])
def test_bad_interventions(wanted, error, said):
    base, _ = two("gpt2")
    with pytest.raises(error, match=said), torch.no_grad(), intervened(model("gpt2"), wanted):
        model("gpt2")(**base[1])


def test_one_that_never_fired_is_an_error():
    with pytest.raises(RelpropError, match="nothing was done at L0.attn.H1"):
        with intervened(model("gpt2"), {"L0.attn.H1": Zero()}):
            pass


@pytest.mark.parametrize("text", ["L5.attn.H3.pattern@-1", "L5.mlp[17]@2", "L*[*]", "embed[3]", "L0.mlp.N2"])
def test_sites_as_text(text):
    assert str(Site.parse(text)) == text
