"""Effects of the mediators that an estimate ranks first: exact, and the ranking's agreement reported as it is."""
from __future__ import annotations

import pytest
import torch
from test_effects import CLOSE, asked, model, two
from torch.testing import assert_close

from relprop.approximation import METHODS, agreement, estimates
from relprop.errors import Undefined
from relprop.mediation import KL, LogOdds, Ratio, effects
from relprop.result import Effects

AT = ["L*.mlp.N*", "L*.attn.H*"]
QUICK = dict(resamples=9)


@pytest.mark.parametrize("method", METHODS)
def test_the_first_are_recomputed_exactly(method):
    base, other = two("gpt2")
    whole = effects(model("gpt2"), base, other, LogOdds(5, [6, 7]), at=AT, **QUICK)
    found = effects(model("gpt2"), base, other, LogOdds(5, [6, 7]), at=AT, estimate=method, verify=6, **QUICK)
    at = [whole.mediators.index(name) for name in found.mediators]
    assert len(at) == 6 and found.indirect.abs().amax(1).min() > 1e-6
    assert_close(found.indirect, whole.indirect[at], **CLOSE)
    said = found.about["estimate"]
    assert list(said["mean"]) == list(whole.mediators) and said["method"] == method and said["drawn"] == 6
    mean = torch.tensor(list(said["mean"].values()), dtype=torch.float64)
    assert at == mean.abs().argsort(descending=True, stable=True)[:6].tolist()  # in the order of the ranking
    assert said["spearman"] > 0.6 and said["pearson"] > 0.8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", ["L*.attn.H*", "L*.mlp.N*", "L*.attn.H*.pattern"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_every_method_ranks_every_kind(method, at, name):
    """And says how well, by correlations and recall."""
    base, other = two(name)
    found = effects(model(name), base, other, asked(name), at=at, estimate=method, verify=3, **QUICK)
    said = found.about["estimate"]
    assert len(found.mediators) == min(3, said["count"]) and said["k"] == said["verified"] == 3
    assert all(-1 <= said[name] <= 1 for name in ("pearson", "spearman")) and 0 <= said["recall"] <= 1
    assert max(map(abs, said["mean"].values())) > 1e-9


def test_the_ranking_is_judged_by_the_exact_effects():
    """All of them where all are verified: the same as the agreement of two sweeps."""
    base, other = two("timm-vit")
    ask = asked("timm-vit")
    whole = effects(model("timm-vit"), base, other, ask, at="L*.attn.H*", **QUICK)
    found = effects(model("timm-vit"), base, other, ask, at="L*.attn.H*", estimate="attribution", verify=99, **QUICK)
    said = found.about["estimate"]
    plain = estimates(model("timm-vit"), base, other, ask, at="L*.attn.H*")
    wanted = agreement(plain.mean, whole.indirect.mean(1))
    assert (said["pearson"], said["recall"]) == pytest.approx((wanted.pearson, wanted.recall), rel=1e-6)
    assert said["spearman"] == pytest.approx(wanted.spearman) and said["drawn"] == 0
    assert sorted(found.mediators) == sorted(whole.mediators)


def test_a_wrong_ranking_is_told(monkeypatch):
    from relprop.mediation import estimate

    base, other = two("gpt2")
    right = estimate.estimated

    def wrong(*args, **options):
        found = right(*args, **options)
        object.__setattr__(found, "values", 1 / (found.values.mean(0, keepdim=True) + 1e-9).expand(3, -1))
        return found

    options = dict(at=AT, estimate="attribution", verify=8, **QUICK)
    assert effects(model("gpt2"), base, other, LogOdds(5, 6), **options).about["estimate"]["recall"] == 1
    monkeypatch.setattr(estimate, "estimated", wrong)
    said = effects(model("gpt2"), base, other, LogOdds(5, 6), **options).about["estimate"]
    assert said["recall"] < 0.5 and said["pearson"] < 0.8


def test_sets_ratios_and_examples():
    base, other = two("gpt2")
    at = {"first": "L0.attn.H*", "all": ["L1.attn.H0", "L1.mlp"], "one": "L1.attn.H1@-1"}
    keep = torch.tensor([True, False, True])
    found = effects(model("gpt2"), base, other, Ratio(5, 6), at=at, scale="ratio", keep=keep, estimate="attribution",
                    verify=3, **QUICK)
    whole = effects(model("gpt2"), base, other, Ratio(5, 6), at=at, scale="ratio", keep=keep, **QUICK)
    assert_close(found.indirect, whole.indirect[[whole.mediators.index(name) for name in found.mediators]], **CLOSE)
    assert found.about["estimate"]["pearson"] > 0.9
    for name, mean in found.about["estimate"]["mean"].items():
        assert mean == pytest.approx(float(found.indirect[found.mediators.index(name)].mean()), rel=0.5), name


def test_it_is_saved(tmp_path):
    base, other = two("gpt2")
    found = effects(model("gpt2"), base, other, LogOdds(5, 6), estimate="attribution", verify=2, **QUICK)
    for suffix in ("json", "safetensors"):
        again = Effects.open(found.save(tmp_path / f"found.{suffix}"))
        assert again.about["estimate"] == found.about["estimate"] and again.mediators == found.mediators


@pytest.mark.parametrize("options, error, said", [
    (dict(verify=3), ValueError, "give estimate="), (dict(estimate="guess"), ValueError, "an estimate is one of"),
    (dict(estimate="attribution", verify=0), ValueError, "verify is 0"),
    (dict(estimate="attribution", kind="total"), ValueError, "estimates are of indirect effects"),
    (dict(estimate="attribution", outcome=KL()), Undefined, "no slope at the base")])
def test_bad_input(options, error, said):
    base, other = two("gpt2")
    ask = options.pop("outcome", LogOdds(5, 6))
    with pytest.raises(error, match=said):
        effects(model("gpt2"), base, other, ask, **options)
