"""What models of pictures, videos and sounds compute with beside transformers' common parts: the books balance in
float64, and relevance comes to what is seen or heard as well as to what is read.
"""
import pytest
import torch

from relprop.census.architecture import value
from relprop.explain import explain

MECHANISMS = {
    "shifted windows, merged patches": "image-classification/swin/SwinForImageClassification",
    "cosine attention in windows": "image-classification/swinv2/Swinv2ForImageClassification",
    "focal modulation": "image-classification/focalnet/FocalNetForImageClassification",
    "pooled tokens as a mixer": "image-classification/poolformer/PoolFormerForImageClassification",
    "attention biases, subsampled": "image-classification/levit/LevitForImageClassification",
    "latents that read pixels": "image-classification/perceiver/PerceiverForImageClassificationFourier",
    "unfolded patches": "image-classification/mobilevitv2/MobileViTV2ForImageClassification",
    "masked units": "image-classification/hiera/HieraForImageClassification",
    "convolutions alone": "image-classification/convnext/ConvNextForImageClassification",
    "squeezed and excited": "image-classification/efficientnet/EfficientNetForImageClassification",
    "standardized weights": "image-classification/bit/BitForImageClassification",
    "tubes of a video": "video-classification/videomae/VideoMAEForVideoClassification",
    "time and space apart": "video-classification/timesformer/TimesformerForVideoClassification",
    "a convolution over positions of a sound": "audio-classification/wav2vec2/Wav2Vec2ForSequenceClassification",
    "gated relative positions": "audio-classification/wavlm/WavLMForSequenceClassification",
    "disentangled positions, squeezed": "audio-classification/sew-d/SEWDForSequenceClassification",
    "convolutions in a layer": "audio-classification/wav2vec2-conformer/Wav2Vec2ConformerForSequenceClassification",
    "features put among words": "image-text-to-text/llava/LlavaForConditionalGeneration",
    "tiles packed with newlines": "image-text-to-text/llava_next/LlavaNextForConditionalGeneration",
    "a resampler": "image-text-to-text/idefics2/Idefics2ForConditionalGeneration",
    "shuffled pixels": "image-text-to-text/idefics3/Idefics3ForConditionalGeneration",
    "queries that read a picture": "image-text-to-text/blip-2/Blip2ForConditionalGeneration",
    "words that look at tiles": "image-text-to-text/mllama/MllamaForConditionalGeneration",
    "patches of all pictures in a row": "image-text-to-text/qwen2_vl/Qwen2VLForConditionalGeneration",
    "features added in several layers": "image-text-to-text/qwen3_vl/Qwen3VLForConditionalGeneration",
    "two towers": "zero-shot-image-classification/clip/CLIPModel",
}


def precise(architecture):
    model = architecture.model()
    inputs = architecture.inputs(model)  # in float32, as is tried
    return model.double(), {name: one.double() if one.is_floating_point() else one for name, one in inputs.items()}


QUICK = ("focal modulation", "standardized weights", "gated relative positions", "features put among words",
         "patches of all pictures in a row")


@pytest.mark.parametrize("method", ["attnlrp", "cp-lrp"])
@pytest.mark.parametrize("key", [pytest.param(key, id=name, marks=() if name in QUICK else pytest.mark.slow)
                                 for name, key in MECHANISMS.items()])
def test_the_books_balance(architectures, key, method):
    model, inputs = precise(architectures[key])
    found = explain(model, dict(inputs), value, method=method)
    assert found.ledger.error.max() < 1e-9
    assert (found.ledger.input != 0).all()
    for name, one in inputs.items():
        if one.is_floating_point() or name == "input_ids":
            assert found.inputs.get(name, found.map).abs().sum() > 0, name


def test_a_group_norm_may_be_updated_in_place():
    class Swish(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = torch.nn.GroupNorm(2, 4), torch.nn.Conv2d(4, 3, 2)

        def forward(self, x):
            x = self.norm(x)
            x *= torch.sigmoid(x)
            return self.conv(x).mean((2, 3))

    torch.manual_seed(0)
    model, x = Swish().double(), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.nn.init.normal_(model.norm.bias)
    for method in ("attnlrp", "cp-lrp"):
        found = explain(model, x, target=[0, 2], method=method)
        assert found.ledger.error.max() < 1e-9 and found.ledger.absorbed["biases"].abs().min() > 0


@pytest.mark.parametrize("side", ["right", "left"])
def test_sequences_that_are_padded_keep_their_relevance(side):
    class Padded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))  # says the dtype

        def forward(self, x):
            several = [x[:, :2].flatten(0, 1), x[:, 2:].flatten(0, 1), x[:, :1].flatten(0, 1)]
            together = torch.nn.utils.rnn.pad_sequence(several, True, 0.5, side)  # (3, M, D)
            return (together * torch.arange(1.0, 4.0, dtype=x.dtype)[:, None, None]).sum().expand(1, 2)

    x = torch.randn(1, 5, 3, dtype=torch.float64)
    found = explain(Padded(), x, target=0, method="attnlrp")
    weights = torch.tensor([4.0, 1.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(found.map[0].double(), x[0].sum(1) * weights, atol=1e-5, rtol=1e-5)
    filled = 0.5 * 3 * (1 * 1 + 3 * 2)  # one place of the first, two of the third, three features each
    assert abs(found.ledger.absorbed["other constants"] - filled).max() < 1e-9 and found.ledger.error.max() < 1e-9
