"""What the census gives models to read: pictures, videos and sounds in the layout that each takes, beside words."""
import pytest
import torch

from relprop.census import config
from relprop.census.architecture import value
from relprop.census.inputs import inputs
from relprop.explain import explain
from relprop.sight import prepared
from relprop.still import settled

READ = {
    "a picture": "image-classification/vit/ViTForImageClassification",
    "a picture in windows": "image-classification/swin/SwinForImageClassification",
    "patches with their shapes": "image-classification/siglip2/Siglip2ForImageClassification",
    "a picture and a text apart": "zero-shot-image-classification/clip/CLIPModel",
    "frames": "video-classification/videomae/VideoMAEForVideoClassification",
    "samples of a sound": "audio-classification/wav2vec2/Wav2Vec2ForSequenceClassification",
    "a spectrogram": "audio-classification/whisper/WhisperForAudioClassification",
    "a picture among words": "image-text-to-text/llava/LlavaForConditionalGeneration",
    "tiles among words": "image-text-to-text/llava_next/LlavaNextForConditionalGeneration",
    "several pictures a row": "image-text-to-text/idefics2/Idefics2ForConditionalGeneration",
    "patches in a grid": "image-text-to-text/qwen2_vl/Qwen2VLForConditionalGeneration",
    "patches with their places": "image-text-to-text/pix2struct/Pix2StructForConditionalGeneration",
    "tiles that words look at": "image-text-to-text/mllama/MllamaForConditionalGeneration",
    "a sound among words": "text2text-generation/qwen2_audio/Qwen2AudioForConditionalGeneration",
}


@pytest.mark.parametrize("key", READ.values(), ids=READ)
def test_models_read_what_they_are_given(architectures, key):
    model = architectures[key].model()
    given = architectures[key].inputs(model)
    with torch.no_grad(), settled(model):
        before = value(model(**given))
        for name, one in given.items():
            if one.is_floating_point():
                changed = value(model(**{**given, name: one * 2 + 1}))
                assert not torch.allclose(before, changed), name  # the picture or the sound counts
    assert before.shape == (2,) and before.isfinite().all()


@pytest.mark.parametrize("key", [key for key in READ.values() if "to-text" in key and "llava" in key])
def test_as_many_places_as_features(architectures, key):
    model = architectures[key].model()
    given = architectures[key].inputs(model)
    places = (given["input_ids"] == model.config.image_token_id).sum(1)
    assert places.min() == places.max() > 0
    assert given["attention_mask"].shape == given["input_ids"].shape
    assert given["input_ids"].max() < config.WORDS


def test_special_tokens_are_told_apart():
    import transformers

    made = config.shrunk(transformers.CONFIG_MAPPING["qwen2_vl"])
    ids = [made.image_token_id, made.video_token_id, made.vision_start_token_id, made.vision_end_token_id]
    assert len(set(ids)) == 4 and all(60 <= one < config.WORDS for one in ids)


def test_no_layout_is_an_error_of_the_model(architectures, monkeypatch):
    architecture = architectures[READ["a picture"]]
    model = architecture.model()
    monkeypatch.setattr(model.config, "num_channels", 5)  # what the config says is not what the model has
    with pytest.raises(ValueError, match="channel"):
        inputs("image-classification", model)


def test_patches_are_shared_out_by_the_places_in_the_texts():
    ids = torch.tensor([[7, 1, 1, 2], [1, 7, 7, 7]])  # 1 holds the place of four patches
    grids = torch.tensor([[1, 2, 4], [1, 2, 2]])
    found = prepared({"input_ids": ids, "pixel_values": torch.ones(12, 6), "image_grid_thw": grids}, None, (None, 1),
                     signs=(1,))
    assert found.packing["pixel_values"].tolist() == [0] * 8 + [1] * 4
    with pytest.raises(ValueError, match="which row each is of"):
        prepared({"input_ids": ids, "pixel_values": torch.ones(11, 6), "image_grid_thw": grids}, None, (None, 1),
                 signs=(1,))


def test_packed_patches_are_explained_row_by_row_alike(architectures):
    key = READ["patches in a grid"]
    model = architectures[key].model()
    read = architectures[key].inputs(model)
    given = {name: one.double() if one.is_floating_point() else one for name, one in read.items()}
    model.double()
    both = explain(model, dict(given), value, method="attnlrp")
    count = len(given["pixel_values"]) // 2
    first = {name: one[:count] if name == "pixel_values" else one[:1] for name, one in given.items()}
    alone = explain(model, first, value, method="attnlrp")
    torch.testing.assert_close(both.map[:1], alone.map)
    torch.testing.assert_close(both.inputs["pixel_values"][:count], alone.inputs["pixel_values"])
    assert both.ledger.error.max() < 1e-9
