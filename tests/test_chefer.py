"""The maps of Chefer et al. 2021, against the outputs of their code and against runs of one kind at a time."""
from __future__ import annotations

import json

import pytest
import torch
from conftest import SHARED
from tiny import bert, gpt2, images, targets, text, vit
from torch import Tensor, nn

from relprop import attention, composite
from relprop.pattern import attend
from relprop.relevance import propagate
from relprop.subject import Subject
from relprop.tokens import Batch
from relprop.trace import Tap

REFERENCE = SHARED / "reference"
CASES = sorted(path.stem for path in REFERENCE.glob("chefer_*.json"))
RULES = {"": "chefer", "orig_lrp.": "chefer-lrp"}
SAME = {"": 1e-5, "orig_lrp.": 2e-5}  # of float64: the originals add 1e-9 to every denominator


def case(name: str) -> tuple[dict, dict[str, Tensor]]:
    from safetensors.torch import load_file

    return json.loads((REFERENCE / f"{name}.json").read_text()), load_file(REFERENCE / f"{name}.safetensors")


def network(about: dict, tensors: dict[str, Tensor]) -> nn.Module:
    """The case's model, as its library builds it."""
    weights = {key[6:]: value.double() for key, value in tensors.items() if key.startswith("model.")}
    if about["config"]["library"] == "timm":
        from timm.models.vision_transformer import VisionTransformer

        model = VisionTransformer(**about["config"]["kwargs"]).double().eval()
        model.norm.eps = 1e-5  # of the original
    else:
        from transformers import BertConfig, BertForSequenceClassification

        model = BertForSequenceClassification(BertConfig(**about["config"]["config"])).double().eval()
    model.load_state_dict(weights, strict=False)
    return model


def batch_of(about: dict, tensors: dict[str, Tensor], prefix: str) -> Batch:
    if about["config"]["library"] == "timm":
        return images(tensors["input.pixel_values"].double(), about["config"]["kwargs"]["patch_size"])
    ids, mask = (tensors[f"input.{prefix}{name}"] for name in ("input_ids", "attention_mask"))
    batch = text(ids[0, :int(mask.sum())].tolist())
    longer = text(ids[0, :int(mask.sum())].tolist(), [5] * ids.shape[1])  # padded by another row
    return batch if mask.all() else longer


def runs() -> list[tuple[str, str, str, str]]:
    """Case, inputs ("nopad." or ""), target, rules: one for each that has outputs."""
    found = []
    for name in CASES:
        about = json.loads((REFERENCE / f"{name}.json").read_text())
        inputs = {f"{k}.": v for k, v in about["targets"].items()} if "bert" in name else {"": about["targets"]}
        found += [(name, prefix, target, rules) for prefix, wanted in inputs.items() for target in wanted
                  for rules in RULES if any(f"{prefix}{rules}{target}." in key for key in about["outputs"])]
    return found


RUNS = runs() or [pytest.param(*[None] * 4, marks=pytest.mark.skip(reason=f"no {REFERENCE}: it does not ship"))]


class Compared:
    """One run of a case: the original's outputs, and how far ours are from them, relative to the largest entry."""

    def __init__(self, name: str, prefix: str, target: str, rules: str) -> None:
        self.about, tensors = case(name)
        self.out = {key[6:]: value for key, value in tensors.items() if key.startswith("out64.")}
        self.key, self.rules = f"{prefix}{rules}{target}.", rules
        self.subject = Subject(network(self.about, tensors))
        self.batch = batch_of(self.about, tensors, prefix)
        wanted = self.about["targets"]
        self.index = (wanted[prefix[:-1]] if prefix else wanted)[target]
        self.text = bool(prefix)

    def by(self, method: str, **options: object) -> Tensor:
        """Our map: of the text's own tokens but the first, whose own entry is a matter of display, or of patches."""
        found = attention.METHODS[method](self.subject, self.batch, targets(self.index, self.batch, labels=None),
                                          **options).map[0]
        if self.text:
            return found[1:self.length]
        size = self.about["config"]["kwargs"]["patch_size"]
        return found.double().reshape(len(found) // size, size, -1, size).sum((1, 3))

    @property
    def length(self) -> int:
        return int(self.batch.kwargs["attention_mask"][0].sum())

    def close(self, found: Tensor, name: str, *, whole: str | None = None, tolerance: float | None = None) -> None:
        expected = self.out[whole or f"{self.key}{name}"]
        if self.text and expected.shape[:1] == (1,):
            expected = expected[0, 1:self.length]
        expected = expected.reshape(found.shape)
        largest = expected.abs().max()
        assert largest > 0
        # maps are float32
        assert float((found - expected).abs().max() / largest) < (tolerance or max(SAME[self.rules], 2e-7))


@pytest.mark.parametrize("name, prefix, target, rules", RUNS)
def test_maps_equal_the_original(name, prefix, target, rules):
    run = Compared(name, prefix, target, rules)
    by_rules = {"rules": RULES[rules]}
    if run.text:
        for layer in (0, 1):
            run.close(run.by("transformer-attribution", start_layer=layer, **by_rules), f"LRP_start{layer}")
        run.close(run.by("partial-lrp", **by_rules), "LRP_last_layer")
        return
    for layer, end in ((0, ""), (1, "_start1")):
        run.close(run.by("transformer-attribution", start_layer=layer, **by_rules), f"transformer_attribution{end}")
        run.close(run.by("lrp-rollout", start_layer=layer, **by_rules), f"rollout{end}")
    for layer, where in ((-1, "last_layer"), (1, "second_layer")):
        run.close(run.by("partial-lrp", layer=layer, **by_rules), where)
        run.close(run.by("partial-lrp", layer=layer, gradient=True, **by_rules), f"{where}_ablation")


@pytest.mark.parametrize("name, prefix, target, rules", RUNS)
def test_relevance_and_gradient_of_patterns_equal_the_original(name, prefix, target, rules):
    run = Compared(name, prefix, target, rules)
    asked = targets(run.index, run.batch, labels=None)
    if f"{run.key}attn_cam" not in run.out:
        pytest.skip("the original's patterns are not stored for this target")
    found = attend(run.subject.model, run.batch.args, run.batch.kwargs, lambda output: asked.value(output, run.batch),
                   composite=attention.RULES[RULES[rules]]())
    wanted = run.out[f"{run.key}attn_cam"]
    size = run.length if run.text else wanted.shape[-1]
    cut = (slice(None), slice(None), slice(size), slice(size))
    for ours, theirs in (("relevance", "attn_cam"), ("slope", "attn_grad")):
        if f"{run.key}{theirs}" not in run.out:
            continue
        ours = torch.stack([getattr(pattern, ours)[0] for pattern in found.patterns])
        theirs = run.out[f"{run.key}{theirs}"]
        assert ((ours[cut] - theirs[cut]).abs().max() / theirs.abs().max()) < SAME[rules]


@pytest.mark.parametrize("name, prefix, target, rules", RUNS)
def test_full_lrp_equals_the_original(name, prefix, target, rules):
    run = Compared(name, prefix, target, rules)
    found = attention.full_lrp(run.subject, run.batch, targets(run.index, run.batch, labels=None), rules=RULES[rules])
    if run.text:
        run.close(found.map[0, 1:run.length], "full_lrp")
    else:
        run.close(found.map[0], "full")


# Two ways back -------------------------------------------------------------------------------------------------------


def separately(model: nn.Module, batch: Batch, value: object) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients from a run without rules, and relevance of the patterns by taps of an ordinary propagation."""
    plain = attend(model, batch.args, batch.kwargs, value)
    seen: dict[str, int] = {}
    taps = {}
    for place, pattern in enumerate(plain.patterns):
        nth = seen[pattern.path] = seen.get(pattern.path, -1) + 1
        taps[str(place)] = Tap(pattern.path, "softmax", "output", nth)
    found = propagate(model, batch.args, batch.kwargs, value, composite.chefer(), taps=taps)
    start = found.value.reshape(-1, 1, 1, 1)
    return [p.slope for p in plain.patterns], [found.tapped[str(i)] / start for i in range(len(taps))]


@pytest.mark.parametrize("model, batch", [(bert, text([2, 5, 6, 7, 3], [2, 8, 3])), (gpt2, text([5, 6, 7])),
                                          (vit, images(torch.randn(2, 3, 24, 24).double(), 6))],
                         ids=["bert", "gpt2", "vit"])
def test_one_forward_gives_what_two_runs_give(seed, model, batch):
    model = model()

    def value(output: object) -> Tensor:
        logits = getattr(output, "logits", output)
        return (logits if logits.dim() == 2 else logits[:, -1])[:, 1]

    both = attend(model, batch.args, batch.kwargs, value, composite=composite.chefer())
    slopes, relevance = separately(model, batch, value)
    assert len(slopes) == len(both.patterns) > 1
    for pattern, slope, share in zip(both.patterns, slopes, relevance, strict=True):
        assert slope.abs().max() > 0 and share.abs().max() > 0
        torch.testing.assert_close(pattern.slope, slope, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(pattern.relevance, share, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["transformer-attribution", "lrp-rollout", "full-lrp"])
def test_relevance_inside_starts_at_one_and_is_that_of_the_rules(seed, method):
    batch, model = text([2, 5, 6, 7, 3], [2, 8, 3]), Subject(bert())
    asked = targets(1, batch)
    found = attention.METHODS[method](model, batch, asked, at=("L1", "L1.attn.H0.pattern", "L0.in"))
    assert list(found.latents) == ["L1", "L1.attn.H0.pattern", "L0.in"] or method == "full-lrp"
    torch.testing.assert_close(found.latents["L1"].sum(1), torch.ones(2), rtol=1e-3, atol=1e-3)  # biases take none
    wanted = attend(model.model, (), batch.kwargs, lambda output: asked.value(output, batch),
                    composite=composite.chefer()).patterns[1].relevance[:, 0].float()
    assert wanted.abs().max() > 0
    torch.testing.assert_close(found.latents["L1.attn.H0.pattern"], wanted, rtol=1e-4, atol=1e-6)
    if method == "full-lrp":
        torch.testing.assert_close(found.map, found.latents["L0.in"])


@pytest.mark.parametrize("method", ["transformer-attribution", "lrp-rollout", "partial-lrp", "full-lrp"])
def test_a_value_of_zero_has_no_relevance_that_starts_at_one(seed, method):
    batch = images(torch.randn(2, 3, 24, 24).double(), 6)
    zero = targets(lambda output: output[:, 0] - output[:, 0].detach() * torch.tensor([0.5, 1.0]), batch)
    with pytest.raises(ValueError, match="value of row 1 is exactly 0"):
        attention.METHODS[method](Subject(vit()), batch, zero)
