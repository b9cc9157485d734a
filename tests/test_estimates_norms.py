"""Finite changes at norms: exact where a norm is all that is not linear, and better ranks than the gradient's."""
from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from families import FAMILIES
from test_address import EXPERTS
from test_effects_families import EVERY, asked
from test_estimates import BASE, OTHER, difference, exact, linear, two
from torch import nn
from torch.testing import assert_close

import relprop
from relprop.approximation import agreement, estimates, finite
from relprop.approximation.norms import Norm, Passage, first_order, stations
from relprop.approximation.place import places
from relprop.intervene import Resample, Site, intervened, parts
from relprop.mediation import Difference, LogOdds, Ratio, effects
from relprop.ops import norm
from relprop.relevance import propagate
from relprop.trace import Tap
from relprop.trace.stream import readings

D = 6


class Gemma(nn.Module):
    """An RMSNorm whose weight is one more than its parameter, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * (1 + self.weight)


class Scale(nn.Module):
    """No norm: a weight for each entry."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, x):
        return x * self.weight


NORMS = {"layer": partial(nn.LayerNorm, D, eps=1e-12), "layer-eps": partial(nn.LayerNorm, D, eps=1e-2),
         "layer-plain": partial(nn.LayerNorm, D, elementwise_affine=False), "rms": partial(nn.RMSNorm, D, eps=1e-6),
         "gemma": partial(Gemma, D)}


def made(name, dtype=torch.float64):
    torch.manual_seed(1)
    module = NORMS[name]().to(dtype)
    for parameter in module.parameters():
        parameter.data.normal_()
    return module


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_norm_is_known_by_what_it_does(name, dtype, seed):
    module = made(name, dtype)
    x = torch.randn(3, 4, D, dtype=dtype)
    found = Norm.of(module, x, module(x))
    assert found.centre == name.startswith("layer")
    again = found.centred(x) * found.scale(found.centred(x)) * found.weight
    constant = module(torch.zeros_like(x))
    assert_close(again + constant, module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", [nn.Linear(D, D), nn.Identity(), nn.GELU(), nn.Tanh(), Scale(D), nn.Dropout(),
                                    nn.BatchNorm1d(D).eval(), nn.GroupNorm(2, D), nn.Softmax(-1)],
                         ids=lambda module: type(module).__name__)
def test_what_is_no_norm_is_told(module, seed):
    x = torch.randn(5, D)
    assert Norm.of(module.eval(), x, module(x)) is None


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("units", [None, 1, 2])
@pytest.mark.parametrize("written", [True, False])
def test_a_change_at_a_norm_is_exact(name, units, written, seed):
    """The oracle: the norm run again with the change of each unit, against relevance per unit g."""
    module = made(name)
    read, g = torch.randn(2, 5, D, dtype=torch.float64)
    C = 4 if written else D
    change, weight = torch.randn(5, C, dtype=torch.float64), torch.randn(C, D, dtype=torch.float64)
    passage = Passage.of(Norm.of(module, read, module(read)), read, g)
    mine = passage.beyond(change, weight if written else None, units)
    count = C if units is None else units
    x = read.clone().requires_grad_()
    slope, = torch.autograd.grad((g * module(x)).sum(), x)
    for unit in range(count):
        width = C // count
        only = torch.zeros_like(change)
        only[:, unit * width:(unit + 1) * width] = change[:, unit * width:(unit + 1) * width]
        d = only @ weight if written else only
        wanted = (g * (module(read + d) - module(read))).sum(-1) - (slope * d).sum(-1)
        assert_close(mine[:, unit], wanted, rtol=1e-6, atol=1e-9)
        assert wanted.abs().max() > 1e-4


def test_norms_alike_are_one(seed):
    """Of two norms of one stream, under any relevance."""
    one = Norm.of(module := made("layer-eps"), read := torch.randn(5, D, dtype=torch.float64), module(read))
    g, h = torch.randn(2, 5, D, dtype=torch.float64)
    change, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, D, dtype=torch.float64)
    apart = [Passage.of(one, read, part) for part in (g, h)]
    together = Passage.joined(apart).beyond(change, weight, None)
    assert_close(together, sum(part.beyond(change, weight, None) for part in apart))
    assert_close(together, Passage.of(one, read, g + h).beyond(change, weight, None))


# -- in models -------------------------------------------------------------------------------------------------------


def found_in(name):
    model = FAMILIES[name].model()
    args, kwargs = FAMILIES[name].inputs(rows=1)
    known = parts(model, args, kwargs)
    taps = list({one.tap for text in ("L*.attn.H*", "L*.mlp.N*") for one in places(known, Site.parse(text))})
    return known, stations(model, args, kwargs, taps, finite())


@pytest.mark.parametrize("name, counts", [
    ("gpt2", [1, 2, 3, 4]), ("llama", [1, 2, 3, 4]), ("gemma2", [1, 1, 1, 1]), ("bert", [1, 1, 1, 1]),
    ("gpt-neox", [2, 2, 4]), ("timm-vit", [1, 2, 3, 4]), ("torch-encoder", [1, 1, 1, 1]),
    ("torch-encoder-sequence-first", [1, 2, 3])])
def test_the_norms_that_read_a_write(name, counts):
    """Behind a stream all that follow, of layers that norm their own sums the next."""
    known, found = found_in(name)
    assert [len(one.taps) for one in found.found] == counts
    layer = known.layers[0]
    assert len(found.of(layer.attention)) == (1 if set(counts) == {1} else len(counts))


class Followed(nn.Module):
    """What is written by `down` is added to a stream in some way, which `norm` reads."""

    def __init__(self, way):
        super().__init__()
        self.down, self.norm, self.drop, self.way = nn.Linear(4, D), nn.LayerNorm(D), nn.Dropout(), way

    def forward(self, x):
        stream = x @ torch.ones(4, D)
        return self.norm(self.way(self, stream, self.drop(self.down(x))))


@pytest.mark.parametrize("way, read", [
    (lambda model, stream, made: stream + made, True), (lambda model, stream, made: made.add_(stream), True),
    (lambda model, stream, made: stream.add_(made.flatten(0, 1).view_as(stream)), True),
    (lambda model, stream, made: (stream + made.to(torch.float64)).float().contiguous(), True),
    (lambda model, stream, made: torch.add(stream, made, alpha=2), False),
    (lambda model, stream, made: stream - made, False), (lambda model, stream, made: stream + 0.5 * made, False),
    (lambda model, stream, made: stream + made.mul_(0.5), False),
    (lambda model, stream, made: stream + made[:, :1], False),
    (lambda model, stream, made: stream + made.relu(), False), (lambda model, stream, made: stream, False)])
def test_a_write_is_followed_along_sums(way, read, seed):
    model, tap = Followed(way).eval(), Tap("down", "linear", "input")
    found, weights = readings(model, (torch.randn(2, 3, 4),), {}, [tap])
    assert [one.path for one in found if tap in one.writes and one.path != "drop"] == ["norm"] * read
    assert torch.equal(weights[tap], model.down.weight.T)


def last_norm(name):
    """Families in whose last layer the MLP's write meets one norm, and linear maps after that."""
    base, other = two(name)
    return FAMILIES[name].model().double(), base, other, FAMILIES[name].value


@pytest.mark.parametrize("name", ["llama", "gpt2", "torch-encoder", "torch-encoder-sequence-first"])
def test_behind_the_last_norm_alone_effects_are_exact(name):
    model, base, other, value = last_norm(name)
    at = ["L1.mlp.N*", "L1.mlp", "L1", "L1.mlp[*]"]
    mine, plain = (estimates(model, base, other, value, at=at, method=method)
                   for method in ("relevance", "attribution"))
    call = (lambda: model(base)) if isinstance(base, torch.Tensor) else (lambda: model(**base))
    with torch.no_grad():
        before = value(call())
        known = parts(model, *(((base,), {}) if isinstance(base, torch.Tensor) else ((), base)))
        for column, address in list(enumerate(mine.addresses))[::5]:
            with intervened(model, {address: Resample(other)}, known=known):
                # Llama computes its norms in float32
                assert_close(mine.values[:, column], value(call()) - before, rtol=1e-4, atol=1e-6)
    if name != "torch-encoder-sequence-first":  # nothing norms what its last layer writes
        assert not torch.allclose(mine.values, plain.values, rtol=1e-2)


def test_positions_and_rows_are_told_apart():
    model = linear()
    model.transformer.ln_f, plain = nn.LayerNorm(12, dtype=torch.float64), model.transformer.ln_f
    try:
        at = ["L1.mlp.N*@-1", "L1.mlp.N*@0", "L1.mlp.N*", "L1.mlp.N2@-1"]
        mine = estimates(model, BASE, OTHER, difference, at=at, method="relevance")
        assert_close(mine.values, exact(model, BASE, mine.addresses, Resample(OTHER)), rtol=1e-6, atol=1e-9)
        alone = estimates(model, BASE, OTHER, difference, at=at, method="relevance", batch_size=1)
        assert_close(mine.values, alone.values)
        first = estimates(model, BASE, OTHER, difference, at=at, method="attribution")
        assert not torch.allclose(mine.values, first.values, rtol=1e-3) and mine.values.abs().amax() > 1e-3
        exception = finite().but(paths={"*ln_f": norm.gradient})
        assert_close(estimates(model, BASE, OTHER, difference, at=at, method="relevance", composite=exception).values,
                     first.values)
    finally:
        model.transformer.ln_f = plain


def test_a_small_change_is_the_gradients():
    base, other = two("timm-vit")
    near = base + 1e-6 * (other - base)
    model, value = FAMILIES["timm-vit"].model().double(), FAMILIES["timm-vit"].value
    mine, plain = (estimates(model, base, near, value, at=["L*.attn.H*", "L*.mlp.N*"], method=method).values
                   for method in ("relevance", "attribution"))
    assert_close(mine, plain, rtol=1e-3, atol=1e-12)
    assert plain.abs().amax() > 1e-8


def test_the_backward_pass_is_the_gradients():
    found = first_order(finite().but(modules={nn.LayerNorm: norm.finite}, paths={"*x": {"norm": norm.finite}}))
    assert found.rules["norm"] is found.modules[nn.LayerNorm] is found.paths["*x"]["norm"] is norm.gradient


# -- ranks -----------------------------------------------------------------------------------------------------------


def ranks(subject, base, other, outcome, count, seed=0):
    """Spearman of relevance and of attribution with the exact effects of neurons drawn at random."""
    known = relprop.mediation.mediators_of(subject, subject.prepare(base), "L*.mlp.N*")
    names = list(known)
    chosen = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    chosen = [names[one] for one in chosen]
    wanted = effects(subject, base, other, outcome, at=chosen, resamples=1).indirect.mean(1)
    found = []
    for method in ("relevance", "attribution"):
        made = effects(subject, base, other, outcome, at=chosen, estimate=method, verify=1, resamples=1)
        mean = made.about["estimate"]["mean"]
        found.append(agreement(torch.tensor([mean[name] for name in chosen], dtype=torch.float64), wanted).spearman)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EVERY if name not in EXPERTS])
def test_neurons_of_no_family_are_ranked_worse(name):
    """Than by the gradient, all of them; as far as random weights have ranks that differ."""
    subject, base, other, ask = asked(name)
    rank = partial(effects, subject, base, other, ask, at="L*.mlp.N*", verify=999, resamples=1)
    said = [rank(estimate=method).about["estimate"] for method in ("relevance", "attribution")]
    for measure in ("spearman", "pearson"):
        relevance, attribution = (one[measure] for one in said)
        assert relevance > attribution - 0.005 and relevance > 0.9, measure


@cache
def stories(folder):
    subject = relprop.load(folder / "models" / "stories260k")
    subject.model.double()
    return subject


STORIES = ("The {} was very happy because", "A little {} went to the park and", "One day, the {} was sad because",
           "Once there was a {} who liked to play. The {} had a big dog. One day,")


@pytest.mark.parametrize("outcome", [LogOdds, *(pytest.param(one, marks=pytest.mark.slow)
                                                for one in (Ratio, Difference))])
def test_ranks_of_a_story_are_better_than_the_gradients(shared, outcome):
    base, other = ([text.replace("{}", who) for text in STORIES] for who in ("girl", "boy"))
    she, he = (stories(shared).tokenizer.convert_tokens_to_ids(f"▁{word}") for word in ("she", "he"))
    relevance, attribution = ranks(stories(shared), base, other, outcome(she, he), 200)
    assert relevance > attribution + 0.005 and relevance > 0.95


def givers():
    """Sentences of `tasks-gpt2` in which somebody gives to the one or to the other, and who receives."""
    from relprop.zoo import tasks

    base, other, receives, gives = [], [], [], []
    for text, a, b in zip(tasks.INDIRECT, tasks.NAMES[::3], tasks.NAMES[1::3]):
        said = dict(a=a, b=b, place=tasks.PLACES[0], object=tasks.OBJECTS[0])
        base.append(text.format(giver=b, **said))
        other.append(text.format(giver=a, **said))
        receives.append(f" {a}")
        gives.append(f" {b}")
    return base, other, receives, gives


@pytest.mark.parametrize("outcome, count", [(LogOdds, 150), *(pytest.param(one, 500, marks=pytest.mark.slow)
                                                              for one in (LogOdds, Ratio, Difference))])
def test_ranks_of_the_bundled_model_are_no_worse(outcome, count):
    base, other, receives, gives = givers()
    subject = relprop.load("tasks-gpt2")
    subject.model.double()
    relevance, attribution = ranks(subject, base, other, outcome(receives, gives), count)
    assert relevance > attribution - 1e-3 and relevance != attribution and relevance > 0.95


def test_a_map_by_these_rules_is_the_gradients():
    args, kwargs = FAMILIES["llama"].inputs()
    one, other = (propagate(FAMILIES["llama"].model(), args, kwargs, FAMILIES["llama"].value, rules, ledger=False)
                  for rules in (finite(), "gradient"))
    assert_close(one.relevance["input_ids"], other.relevance["input_ids"])
    assert other.relevance["input_ids"].abs().amax() > 1e-3
