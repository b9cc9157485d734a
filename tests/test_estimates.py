"""First-order estimates: exact where a model is linear, complete where they are integrated, and equal to the peers'."""
from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from families import FAMILIES
from torch.testing import assert_close

from relprop.approximation import METHODS, Query, agreement, estimated, estimates, relp
from relprop.errors import Undefined
from relprop.intervene import Resample, Zero, intervened, parts
from relprop.mediation import LogOdds, effects
from relprop.mediation.stage import read
from relprop.numerics import stabilize
from relprop.subject import Subject
from relprop.target import Contrast, Token

SOME = ["gpt2", "llama", "bert-eager", "torch-encoder-sequence-first"]
EVERYWHERE = ["embed", "L*.in", "L*.mid", "L*", "L*.attn", "L*.attn.H*", "L*.attn.H*.pattern", "L*.mlp", "L*.mlp.N*",
              "L*.mlp[*]"]


@cache
def linear(**changes):
    """A GPT-2 whose last layer is linear in everything but its queries and keys."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_embd=12, n_layer=2, n_head=3, n_positions=16, n_inner=6,
                        initializer_range=0.4, activation_function="linear", bos_token_id=1, eos_token_id=2, **changes)
    made = GPT2LMHeadModel(config).double().eval()
    made.transformer.ln_f = made.transformer.h[1].ln_2 = torch.nn.Identity()
    return made


def ids(*rows):
    return {"input_ids": torch.tensor(rows)}


BASE, OTHER = ids([3, 4, 5, 6], [7, 8, 9, 10]), ids([3, 11, 5, 6], [7, 8, 12, 10])


def difference(output):
    return output.logits[:, -1, 7] - output.logits[:, -1, 8]


def exact(made, base, addresses, intervention):
    """The effect of each mediator by a run of its own, (B, M)."""
    with torch.no_grad():
        plain, found, all_parts = difference(made(**base)), [], parts(made, (), base)
        for address in addresses:
            with intervened(made, {address: intervention}, known=all_parts):
                found.append(difference(made(**base)) - plain)
    return torch.stack(found, 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("along", ["inputs", "mediators"])
def test_a_linear_model_has_exact_estimates(method, along):
    at = ["L1", "L1.mid", "L1.attn.H*", "L1.mlp", "L1.mlp.N*", "L1.attn.H1@-1", "L1.mlp.N3@1", "L1.attn.H*.pattern"]
    if method == "integrated-gradients" and along == "inputs":  # values of other inputs lie on the way to a pattern's
        at = at[:-1]
    found = estimates(linear(), BASE, OTHER, difference, at=at, method=method, along=along)
    wanted = exact(linear(), BASE, found.addresses, Resample(OTHER))
    assert_close(found.values, wanted)
    assert wanted.abs().amax() > 0.01
    with torch.no_grad():
        assert_close(found.base, difference(linear()(**BASE)))
        assert_close(found.counterfactual, difference(linear()(**OTHER)))


def test_neurons_at_a_position_that_nothing_reads_have_no_effect():
    found = estimates(linear(), BASE, OTHER, difference, at=["L1.mlp.N*@1", "L1.mlp.N*@-1"], method="relevance")
    assert len(found) == 2 * 6 and not found.values[:, :6].any() and found.values[:, 6:].abs().amax() > 1e-3


def test_without_a_counterfactual_values_go_to_zero():
    found = estimates(linear(), BASE, None, difference, at=["L1.attn.H*", "L1.mlp.N*"], method="attribution")
    assert_close(found.values, exact(linear(), BASE, found.addresses, Zero()))
    assert found.counterfactual.isnan().all()


def test_inputs_of_different_length_are_aligned():
    longer, align = ids([3, 11, 13, 5, 6], [7, 14, 8, 12, 10]), torch.tensor([0, -1, 3, 4])
    at = ["L1.attn.H*", "L1.mlp.N*", "L1@1"]
    with pytest.raises(ValueError, match="make them equal, or give align"):
        estimates(linear(), BASE, longer, difference, at=at)
    found = estimates(linear(), BASE, longer, difference, at=at, align=align)
    assert_close(found.values, exact(linear(), BASE, found.addresses, Resample(longer, align)))
    assert found.values[:, -1].abs().amax() == 0 < found.values[:, 0].abs().amin()


def two(name, dtype=torch.float64):
    """A model, an input, and another of the same shape; the value of its output."""
    args, kwargs = FAMILIES[name].inputs(dtype)
    if args:
        return args[0], args[0].flip(0) * 0.5
    return kwargs, {**kwargs, "input_ids": torch.where(kwargs["input_ids"] == 0, 0, (kwargs["input_ids"] + 5) % 30 + 3)}


@cache
def subject(name):
    return Subject.from_module(FAMILIES[name].model().double())


@cache
def known(name):
    base, _ = two(name)
    return parts(subject(name).model, *(((base,), {}) if isinstance(base, torch.Tensor) else ((), base)))


def found(name, base, other, at, **options):
    return estimates(subject(name), base, other, FAMILIES[name].value, at=at, known=known(name), **options)


@pytest.mark.parametrize("name", SOME)
def test_heads_and_neurons_sum_to_what_they_make(name):
    """Through the output projection, whose bias does not change; under rules that are linear in what changes."""
    base, other = two(name)
    for options in (dict(method="attribution"), dict(method="relevance", composite=relp())):
        heads, attention, mlp = (found(name, base, other, at, **options).values
                                 for at in ("L*.attn.H*", "L*.attn", "L*.mlp"))
        neurons = found(name, base, other, "L*.mlp.N*", **options).values
        layers = len(known(name).layers)
        assert_close(heads.unflatten(1, (layers, -1)).sum(2), attention)
        assert_close(neurons.unflatten(1, (layers, -1)).sum(2), mlp)
        assert attention.abs().amax() > 1e-4 and mlp.abs().amax() > 1e-4


@pytest.mark.parametrize("name", SOME)
def test_the_gradient_composite_is_attribution(name):
    base, other = two(name)
    at = EVERYWHERE
    one, two_ = (found(name, base, other, at, method=method, composite="gradient") for method in METHODS[:2])
    assert_close(one.values, two_.values)
    assert one.addresses == two_.addresses and len(one) == one.values.shape[1]
    assert all((one.values[:, at].abs().amax() > 1e-9) for at in range(0, 4))


@pytest.mark.parametrize("name", ["timm-vit", "torch-encoder-sequence-first"])
def test_a_small_step_has_exact_estimates(name):
    base, other = two(name)
    near = base + 1e-5 * (other - base)
    at = ["L0.attn.H*", "L1.attn.H*.pattern", "L0", "L0.mlp[*]"]
    estimate = found(name, base, near, at, method="attribution")
    value, run = FAMILIES[name].value, subject(name).model
    with torch.no_grad():
        plain = value(run(base))
        for column, address in list(enumerate(estimate.addresses))[::3]:
            with intervened(run, {address: Resample(near)}, known=known(name)):
                assert_close(estimate.values[:, column], value(run(base)) - plain, rtol=2e-3, atol=1e-9)
    assert estimate.values.abs().amax() > 1e-7


def test_integrated_gradients_of_the_inputs_are_complete():
    """Word embeddings at all positions, and the first layer's own input, sum to the total effect."""
    base, other = two("llama")
    total = found("llama", base, other, [f"embed@{at}" for at in range(4)] + ["embed"],
                  method="integrated-gradients", steps=30)
    assert_close(total.values[:, 4], total.counterfactual - total.base, rtol=1e-6, atol=1e-9)
    assert_close(total.values[:, :4].sum(1), total.values[:, 4])  # the value is read at position 3
    coarse = found("llama", base, other, "embed", method="integrated-gradients", steps=1)
    assert not torch.allclose(coarse.values[:, 0], total.values[:, 4], rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "bert-eager", "torch-encoder-sequence-first"])
def test_integrated_gradients_along_a_mediator_are_its_exact_effect(name):
    base, other = two(name)
    at = ["L0.attn", "L1.mlp", "L1.attn.H1.pattern", "L1.attn.H0.pattern", "L0", "L1.in", "L1.attn.pattern"]
    estimate = found(name, base, other, at, method="integrated-gradients", steps=24, along="mediators").values
    value, run = FAMILIES[name].value, subject(name).model
    call = (lambda: run(base)) if isinstance(base, torch.Tensor) else (lambda: run(**base))
    for column, sites in {0: ["L0.attn"], 1: ["L1.mlp"], 4: ["L0"], (2, 3): ["L1.attn.pattern"], 5: ["L1.in"],
                          6: ["L1.attn.pattern"]}.items():
        with torch.no_grad(), intervened(run, dict.fromkeys(sites, Resample(other)), known=known(name)):
            changed = value(call())
        with torch.no_grad():
            effect = changed - value(call())
        mine = estimate[:, list(column)].sum(1) if isinstance(column, tuple) else estimate[:, column]
        assert_close(mine, effect, rtol=1e-4, atol=1e-9)
        assert effect.abs().amax() > 1e-6


@pytest.mark.parametrize("name", ["bert", "timm-vit"])
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_rows(name, method):
    base, other = two(name)
    at = ["L*.attn.H*", "L*.mlp.N*", "L1@-1", "L1.attn.H*.pattern"]
    whole = found(name, base, other, at, method=method, steps=2)
    rows = found(name, base, other, at, method=method, steps=2, batch_size=1)
    assert_close(whole.values, rows.values)
    assert_close(whole.base, rows.base)
    one = {key: value[1:2] for key, value in base.items()} if isinstance(base, dict) else base[1:2]
    change = {key: value[1:2] for key, value in other.items()} if isinstance(other, dict) else other[1:2]
    assert_close(found(name, one, change, at, method=method, steps=2).values, whole.values[1:2])


def test_queries_add_up():
    """An outcome of two runs is the outcome of one where both runs are the same."""
    made = linear()
    base, other = (Subject.from_module(made).prepare(one) for one in (BASE, OTHER))
    at = ["L0.attn.H*", "L1.mlp.N*", "L0.attn.H*.pattern"]
    logit = lambda token: lambda output, index: output.logits[:, -1, [token, token + 1]]
    ratio = lambda answers: answers[0][:, 0].sigmoid() / answers[1][:, 1].exp()
    twice = [Query(base, other, logit(7)), Query(base, other, logit(3))]
    once = lambda output: output.logits[:, -1, 7].sigmoid() / output.logits[:, -1, 4].exp()
    for method, composite in (("attribution", None), ("relevance", "gradient"), ("relevance", None),
                              ("integrated-gradients", None)):
        several = estimated(made, twice, ratio, at=at, method=method, composite=composite, batch_size=1)
        single = estimates(made, BASE, OTHER, once, at=at, method=method, composite=composite)
        joined = dict(rtol=0.02, atol=1e-4) if method == "relevance" and composite is None else {}
        assert_close(several.values, single.values, **joined)  # of each query's norms there is a mean of its own
        assert_close(several.base, single.base)
        assert_close(several.counterfactual, single.counterfactual)
    assert single.values.abs().amax() > 1e-4


def test_queries_are_the_questions_of_an_outcome():
    """Along each mediator, the log-odds of two continuations have their exact effects, of several tokens as well."""
    subject = Subject.from_module(linear(), task="text-generation")
    base, other = subject.prepare(BASE), subject.prepare(OTHER)
    outcome = LogOdds([[5, 6], [7]], [[8], [9]])
    at = ["L0.attn", "L1.mlp", "L1.in"]

    def answer(question):
        return lambda output, rows: read(question, output, question.at[rows], rows=rows.tolist())

    queries = [Query(one.batch, two.batch, answer(one), prompt=one.prompt, there=answer(two))
               for one, two in outcome.pairs(subject, base, other)]
    assert len(queries) == 2
    found = estimated(subject.model, queries, outcome.value, at=at, method="integrated-gradients", along="mediators",
                      steps=20)
    wanted = effects(subject, base, other, outcome, at=at, resamples=1)
    assert_close(found.values.T, wanted.effect("indirect"), rtol=1e-4, atol=1e-6)
    assert found.values.abs().amin(0).amin() > 1e-3


def test_positions_are_of_the_prompt():
    made = linear()
    base, other = (Subject.from_module(made).prepare(one) for one in (BASE, OTHER))
    prompt = torch.tensor([[True, True, True, False]] * 2)
    query = Query(base, other, lambda output, index: difference(output), prompt=prompt)
    at = ["L1.attn.H*", "L0.attn.H*.pattern"]
    last = estimated(made, [query], at="L0.attn.H*@-1", method="attribution").values
    third = estimates(made, BASE, OTHER, difference, at="L0.attn.H*@2", method="attribution").values
    assert_close(last, third)
    assert last.abs().amax() > 1e-4
    within = estimated(made, [query], at=at, method="attribution", prompt_only=True).values
    with torch.no_grad(), intervened(made, {"L1.attn.H1": Resample(OTHER, torch.tensor([0, 1, 2, -1]))}):
        assert_close(within[:, 1], difference(made(**BASE)) - difference_plain(made))
    assert not torch.allclose(within, estimated(made, [query], at=at, method="attribution").values)


def test_positions_by_name():
    """A span that each row has its own of, also where rows are run one by one; several positions are their sum."""
    named, first, second = (estimates(
        linear(), BASE, OTHER, difference, at=at, spans={"job": [[1], [2, 3]]}, batch_size=1).values
        for at in ("L0.attn.H*@job", "L0.attn.H*@1", "L0.attn.H*@2-3"))
    assert_close(named, torch.stack([first[0], second[1]]))
    assert named.abs().amin() > 1e-6


def difference_plain(made):
    return exact(made, BASE, ["L1.attn.H0"], Resample(BASE))[:, 0] + difference(made(**BASE))


def test_the_prediction_is_that_of_the_base():
    shown = linear()(**BASE).logits[:, -1].argmax(-1).tolist()
    open_, named = (estimates(linear(), BASE, OTHER, target, at="L1.attn.H*").values
                    for target in (None, [Token(token) for token in shown]))
    assert_close(open_, named)


def test_the_model_is_given_back():
    base, other = two("gpt2")
    run = subject("gpt2").model.train()
    before = (FAMILIES["gpt2"].value(run.eval()(**base)).detach(), [p.requires_grad for p in run.parameters()])
    run.train()

    def fails(output):
        raise RuntimeError("in the outcome")

    for method in METHODS:
        found("gpt2", base, other, EVERYWHERE, method=method, steps=1)
        with pytest.raises(RuntimeError, match="in the outcome"):
            estimates(subject("gpt2"), base, other, fails, at="L*", method=method, known=known("gpt2"))
    assert run.training and [p.requires_grad for p in run.parameters()] == before[1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in run.modules())
    assert all(p.grad is None for p in run.parameters())
    assert torch.equal(FAMILIES["gpt2"].value(run.eval()(**base)), before[0])


def test_ranking_and_addresses():
    one = estimates(linear(), BASE, OTHER, difference, at=["L1.mlp.N*", "L1.attn.H2@-1"], method="attribution")
    assert one.addresses[4] == one.address(4) == "L1.mlp.N4" and one.address(6) == "L1.attn.H2@-1"
    with pytest.raises(IndexError, match="no mediator 7"):
        one.address(7)
    top = one.top(5)
    assert [abs(value) for _, value in top] == sorted((abs(v) for v in one.mean.tolist()), reverse=True)[:5]
    assert one.top(1, signed=True)[0][1] == one.mean.max()
    wanted = exact(linear(), BASE, [address for address, _ in top], Resample(OTHER)).mean(0)
    agreed = one.agreement({address: float(value) for (address, _), value in zip(top, wanted)}, k=2)
    assert agreed.count == 5 and agreed.recall == 1 and agreed.pearson > 0.999999 and agreed.spearman == 1
    with pytest.raises(ValueError, match="L0.mlp is none of the 7 mediators"):
        one.agreement({"L0.mlp": 1.0})


def test_agreement():
    exactly = torch.tensor([5.0, -4.0, 3.0, 0.1, 0.0, -0.2])
    assert agreement(exactly * 2, exactly, k=3) == agreement(exactly, exactly, k=3)
    turned = agreement(-exactly, exactly, k=3)
    assert turned.pearson == turned.spearman == -1 and turned.recall == 1
    other = agreement(exactly.flip(0), exactly, k=3)
    assert other.recall == 0 and other.spearman < 0
    assert agreement(exactly, torch.ones(6)).pearson != agreement(exactly, torch.ones(6)).pearson  # NaN
    with pytest.raises(Undefined, match="at least two"):
        agreement(torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match="one number a mediator"):
        agreement(torch.ones(3), torch.ones(2))


@pytest.mark.parametrize("change, message", [
    ({"method": "magic"}, "a method is one of attribution"), ({"along": "time"}, "along inputs or mediators"),
    ({"at": "L7"}, "no layer 7"), ({"at": "L0.attn.H9"}, "no H9 in layer 0"), ({"at": "L0@9"}, "has 4 positions"),
    ({"at": "L0.mlp.N99"}, "no N99"), ({"at": "L0@job"}, "no span of this name"),
    ({"at": "what"}, "is no address"), ({"composite": "none"}, "unknown composite"),
    ({"method": "integrated-gradients", "steps": 0}, "at least 1"),
    ({"method": "integrated-gradients", "steps": [2.0]}, "from 0"),
])
def test_what_cannot_be_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        estimates(linear(), BASE, OTHER, difference, **{"at": "L0", **change})
    with pytest.raises(ValueError, match="as many rows"):
        estimates(linear(), BASE, ids([1, 2, 3, 4]), difference, at="L0")


# -- the original codes ----------------------------------------------------------------------------------------------


@cache
def case(folder, name):
    import transformers
    from safetensors.torch import load_file

    about = json.loads((folder / "reference" / f"circuits_{name}_a.json").read_text())
    tensors = load_file(folder / "reference" / f"circuits_{name}_a.safetensors")
    kind = getattr(transformers, about["model_class"])
    made = kind(kind.config_class(**about["hf_config"])).eval()
    made.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("model.")})
    good_and_bad = [Contrast(Token(a), Token(b)) for a, b in tensors["input.labels"].tolist()]
    return made.double(), tensors, good_and_bad


def stabilized(x, y, g):
    """The peer keeps the pre-activation that it divides by off zero."""
    return g * y / stabilize(x, 1e-6)


METHODS_OF_PEERS = {"atp": {"method": "attribution"},
                    "relp": {"method": "relevance", "composite": relp().but(rules={"activation": stabilized})},
                    "relp_ah": {"method": "relevance",
                                "composite": relp(hold_attention=True).but(rules={"activation": stabilized})}}


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
@pytest.mark.parametrize("peer", METHODS_OF_PEERS)
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_heads_and_blocks_are_the_peers(shared, name, peer, direction):
    made, tensors, outcome = case(shared, name)
    clean, corrupt = ({"input_ids": tensors[f"input.{which}"]} for which in ("clean", "corrupt"))
    base, other = (clean, corrupt) if direction == "noise" else (corrupt, clean)
    heads = tensors[f"out.{peer}.head_by_pos_{direction}"]  # (L, T, H)
    blocks = tensors[f"out.{peer}.block_every_{direction}"][1:]  # (2, L, T)
    L, T, H = heads.shape
    at = [f"L{layer}.attn.H{head}@{position}" for layer in range(L) for position in range(T) for head in range(H)]
    at += [f"L{layer}.{part}@{position}" for part in ("attn", "mlp") for layer in range(L) for position in range(T)]
    wanted = torch.cat([heads.flatten(), blocks.flatten()]).double()
    mine = estimates(made, base, other, outcome, at=at, **METHODS_OF_PEERS[peer]).mean
    assert_close(mine, wanted, rtol=1e-4, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
def test_nodes_are_the_peers(shared, name):
    made, tensors, outcome = case(shared, name)
    clean, corrupt = ({"input_ids": tensors[f"input.{which}"]} for which in ("clean", "corrupt"))
    layers = made.config.num_hidden_layers
    at = ["embed", *(site for layer in range(layers) for site in (f"L{layer}.attn.H*", f"L{layer}.mlp"))]
    ways = {"eap": {"method": "attribution"}, "relp": METHODS_OF_PEERS["relp"],
            "eap_ig_inputs": {"method": "integrated-gradients", "steps": [1.0, 0.8, 0.6, 0.4, 0.2]}}
    effects = tensors["out.exact.node_scores"].double()
    for peer, options in ways.items():
        mine = estimates(made, clean, corrupt, outcome, at=at, **options)
        wanted = tensors[f"out.{peer}.node_scores_edge_sum"].double()
        assert_close(mine.mean, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        if peer != "eap":  # which a saturated softmax misleads
            assert mine.agreement(effects, k=3).spearman > 0.7
