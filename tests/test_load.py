"""A loaded model gives the very output of the model that was saved, on inputs prepared as its own processor does."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image
from torch import nn

from relprop import zoo
from relprop.load import load
from relprop.pixels import plain
from relprop.subject import Subject
from relprop.tokens import ImageUnits, TensorUnits

TEXTS = ["a fine film", "so dull that nobody could like it"]
WORDS = ["a", "fine", "film", "so", "dull", "that", "nobody", "could", "like", "it", "##s"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A BERT tokenizer of eleven words."""
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    return BertTokenizer.from_pretrained(folder, model_max_length=12)


@pytest.fixture(scope="module")
def gpt2_tokenizer():
    from transformers import AutoTokenizer

    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}: the GPT-2 tokenizer does not ship with relprop")
    return AutoTokenizer.from_pretrained(SHARED / "data" / "gpt2-tokenizer")


def bert(kind="BertForSequenceClassification", **options):
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        **options,
    )
    return getattr(transformers, kind)(config).eval()


def gpt2(kind="GPT2LMHeadModel", vocab_size=50257):
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=vocab_size, n_embd=8, n_layer=1, n_head=2, n_positions=32)
    return getattr(transformers, kind)(config).eval()


def vit(channels=3, **options):
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=8,
        num_channels=channels,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        **options,
    )
    return transformers.ViTForImageClassification(config).eval()


def timm_vit(**options):
    import timm

    torch.manual_seed(0)
    options = {"img_size": 32, "num_classes": 5, "embed_dim": 16, "depth": 1, "num_heads": 2, **options}
    return timm.create_model("vit_tiny_patch16_224", **options).eval()


def image_processor(channels=3):
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * channels, image_std=[0.25] * channels)


def picture(mode="RGB", size=(40, 50)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@torch.no_grad()
def out(subject, inputs):
    return subject.forward(subject.prepare(inputs)).logits


# what is saved comes back


def test_folder_of_a_classifier(tmp_path, tokenizer):
    model = bert(id2label={0: "bad", 1: "good"})
    model.save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    subject = load(str(tmp_path / "mine"))
    assert (subject.modality, subject.task, subject.labels) == ("text", "text-classification", ("bad", "good"))
    assert subject.name == "mine" and not subject.model.training and not subject.multilabel
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    torch.testing.assert_close(out(subject, TEXTS), model(**encoded).logits)
    assert torch.equal(out(subject, TEXTS), out(subject, dict(encoded)))
    assert subject.targets("good", 1).targets[0].index == 1
    assert load(tmp_path / "mine", labels=["no", "yes"]).labels == ("no", "yes")
    with pytest.raises(ValueError, match="1 labels for a model of 2 classes"):
        load(tmp_path / "mine", labels=["no"])


def test_folder_without_tokenizer_takes_ids(tmp_path):
    model = gpt2(vocab_size=20)
    model.save_pretrained(tmp_path)
    subject = load(tmp_path)
    assert subject.tokenizer is None and subject.task == "text-generation" and subject.labels is None
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    torch.testing.assert_close(out(subject, ids), model(ids).logits)
    batch = subject.prepare(ids)
    assert batch.units.words == [["1", "2", "3"], ["4", "5", "6"]] and batch.last.tolist() == [2, 2]
    with pytest.raises(ValueError, match="came without a tokenizer"):
        subject.prepare("a fine film")


def test_saved_in_half_runs_in_float32_on_a_cpu(tmp_path):
    gpt2(vocab_size=20).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path).dtype == torch.float32
    assert load(tmp_path, dtype="bf16").dtype == torch.bfloat16
    for half in ("fp16", "float16", torch.float16):
        with pytest.raises(ValueError, match="float16 on a CPU"):
            load(tmp_path, dtype=half)


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_of_an_image_classifier(tmp_path, channels):
    model, processor = vit(channels), image_processor(channels)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    subject = load(tmp_path)
    assert (subject.modality, subject.patch, subject.prefix_tokens) == ("image", (8, 8), 1)
    image = picture()
    pixels = processor(images=[image.convert("L") if channels == 1 else image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(out(subject, image), model(pixels).logits)
    units = subject.prepare(image).units
    assert isinstance(units, ImageUnits) and (units.size, units.grid) == ((32, 32), (4, 4))
    shown = units.images[0].permute(2, 0, 1)[:channels].float() / 255
    torch.testing.assert_close(shown, pixels[0] * 0.25 + 0.5, atol=0.5 / 255 + 1e-6, rtol=0)  # what the model saw


def test_folder_as_timm_writes_it(tmp_path):
    from timm.data import create_transform, resolve_model_data_config
    from timm.models import save_for_hf

    model = timm_vit(img_size=(32, 48))
    save_for_hf(model, tmp_path, model_config={"label_names": list("abcde")}, safe_serialization=True)
    subject = load(tmp_path)
    assert (subject.patch, subject.prefix_tokens, subject.task) == ((16, 16), 1, "image-classification")
    assert subject.labels == tuple("abcde")
    transform = create_transform(**{**resolve_model_data_config(model), "input_size": (3, 32, 48)}, is_training=False)
    batch = subject.prepare([picture(), picture(size=(90, 33))])
    assert batch.units.grid == (2, 3) and batch.args[0].shape == (2, 3, 32, 48)
    torch.testing.assert_close(batch.args[0][0], transform(picture()))
    torch.testing.assert_close(subject.forward(batch), model(batch.args[0]))


def test_folder_with_a_class_and_its_arguments(tmp_path):
    from safetensors.torch import save_file
    from timm.models import VisionTransformer

    kwargs = {
        "img_size": 16,
        "patch_size": 8,
        "in_chans": 1,
        "num_classes": 2,
        "embed_dim": 8,
        "depth": 1,
        "num_heads": 2,
    }
    model = VisionTransformer(**kwargs).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {
        "library": "timm",
        "architecture": "VisionTransformer",
        "kwargs": kwargs,
        "problem": "multi_label",
        "labels": ["0", "1"],
        "input_size": [1, 16, 16],
        "mean": [0.25],
        "std": [0.5],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    subject = load(tmp_path)
    assert subject.multilabel and subject.labels == ("0", "1") and subject.mean == (0.25,)
    image = picture("L", (16, 16))
    pixels = (torch.from_numpy(np.array(image)).float()[None, None] / 255 - 0.25) / 0.5
    batch = subject.prepare(np.array(image))
    torch.testing.assert_close(batch.args[0], pixels)
    torch.testing.assert_close(subject.forward(batch), model(pixels))
    assert torch.equal(batch.units.images[0, :, :, 0], torch.from_numpy(np.array(image))) and batch.units.grid == (2, 2)
    (tmp_path / "config.json").write_text(json.dumps({**config, "architecture": "os.system"}))
    with pytest.raises(ValueError, match=r"no class 'os.system' in timm.models"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["vit-mnist-timm", "vit-mnist-hf"])
def test_real_digits(shared, name):
    """A folder without mean and std takes pictures as they are; one without an image processor takes pixels."""
    with np.load(shared / "models" / "vit-mnist-timm" / "examples.npz") as examples:
        expected = next(torch.from_numpy(examples[key]) for key in examples.files if examples[key].shape == (200, 10))
    with np.load(shared / "data" / "mnist" / "t10k.npz") as mnist:
        digits = next(mnist[key] for key in mnist.files if mnist[key].size > 10_000).reshape(-1, 28, 28)[:200]
    subject = load(shared / "models" / name)
    assert subject.patch == (4, 4) and subject.prefix_tokens == 1
    inputs = digits[..., None] if name == "vit-mnist-timm" else torch.from_numpy(digits[:, None] / 255).float()
    batch = subject.prepare(inputs)
    with torch.no_grad():
        value = subject.targets(7, 200).value(subject.forward(batch), batch)
    assert batch.units.grid == (7, 7)
    torch.testing.assert_close(value, expected[:, 7].float(), atol=1e-4, rtol=1e-4)


def test_real_sentiment(shared):
    subject = load(shared / "models" / "minilm-sentiment")
    batch = subject.prepare(["Lily is happy.", "Lily and her mother were not so happy."])
    assert subject.targets(None, 2).names(subject.forward(batch), batch) == ["POSITIVE", "NEGATIVE"]


def test_real_stories(shared):
    subject = load(shared / "models" / "stories260k")
    batch = subject.prepare(["Once upon a time, there was a little girl named", "Once upon a"])
    assert batch.units.words[1] == ["Once", "upon", "a"] and "token_type_ids" not in batch.kwargs
    assert subject.targets(None, 2).names(subject.forward(batch), batch) == ["'Lily'", "'time'"]


@pytest.mark.parametrize(
    "name", zoo.names() or [pytest.param("", marks=pytest.mark.skip(reason="no bundled model is there yet"))]
)
def test_bundled(name):
    subject = load(name)
    assert subject.name == name and not subject.model.training
    assert subject.labels or subject.task == "text-generation"
    batch = subject.prepare("a fine film" if subject.modality == "text" else picture("L", (60, 60)))
    torch.testing.assert_close(
        subject.targets(None, 1).value(subject.forward(batch), batch),
        subject.targets(None, 1).value(zoo.build(name)[0](*batch.args, **batch.kwargs), batch),
    )


def test_hub_id_in_the_cache(tmp_path, monkeypatch, tokenizer):
    """A hub id is read from the cache when there is no network."""
    folder = tmp_path / "models--someone--fine" / "snapshots" / "0a"
    model = bert()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text("0a")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    subject = load("someone/fine")
    assert subject.name == "someone/fine"
    torch.testing.assert_close(out(subject, TEXTS), model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits)


# what is there already is left as it is


def test_model_and_processor(tokenizer):
    model = bert().train()
    subject = load((model, tokenizer))
    assert subject.model is model and model.training and subject.tokenizer is tokenizer
    assert load(subject) is subject and load(model, tokenizer).modality == "text"
    with pytest.raises(ValueError, match="for models that load makes"):
        load(model, device="cpu")


def test_pipeline(tokenizer):
    from transformers import pipeline

    made = pipeline("text-classification", model=bert(), tokenizer=tokenizer)
    subject = load(made)
    assert subject.model is made.model and subject.tokenizer is tokenizer and subject.task == "text-classification"
    p = out(subject, TEXTS[0]).softmax(1).max().item()
    assert p == pytest.approx(made(TEXTS[0])[0]["score"], abs=1e-6)


def test_plain_module():
    module = nn.Sequential(nn.Linear(4, 3))
    subject = load(module)
    x = torch.randn(2, 4)
    batch = subject.prepare(x)
    assert subject.modality == "tensors" and batch.units == TensorUnits((2, 4)) and batch.rows == 2
    assert torch.equal(subject.targets(2, 2).value(subject.forward(batch), batch), module(x)[:, 2])
    with pytest.raises(TypeError, match="takes a tensor .* not str"):
        subject.prepare("a text")


@pytest.mark.parametrize(
    "options, prefix",
    [({}, 1), ({"class_token": False, "global_pool": "avg"}, 0), ({"reg_tokens": 3}, 4), ({"in_chans": 1}, 1)],
)
def test_timm_module(options, prefix):
    model = timm_vit(**options)
    subject = load(model)
    assert subject.model is model and subject.prefix_tokens == prefix and subject.patch == (16, 16)
    batch = subject.prepare(picture())
    assert batch.args[0].shape == (1, options.get("in_chans", 3), 32, 32) and subject.forward(batch).shape == (1, 5)


@pytest.mark.parametrize(
    "name, options, prefix",
    [
        ("DeiTForImageClassification", {}, 2),
        ("Dinov2WithRegistersForImageClassification", {"num_register_tokens": 3}, 4),
        ("Dinov2ForImageClassification", {}, 1),
        ("SwinForImageClassification", {"embed_dim": 8, "depths": [1], "num_heads": [2]}, 0),
    ],
)
def test_prefix_tokens(name, options, prefix):
    import transformers

    kind = getattr(transformers, name)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = kind.config_class(image_size=32, patch_size=8, **(options if "depths" in options else sizes | options))
    assert load(kind(config)).prefix_tokens == prefix


@pytest.mark.parametrize(
    "name, options, prefix",
    [
        ("deit_tiny_distilled_patch16_224", {}, 2),
        ("cait_xxs24_224", {}, 0),
        ("swin_tiny_patch4_window7_224", {"depths": [1], "num_heads": [2]}, 0),
        ("beit_base_patch16_224", {}, 1),
        ("eva02_tiny_patch14_224", {}, 1),
    ],
)
def test_prefix_tokens_of_timm(name, options, prefix):
    import timm

    size = 28 if "14" in name else 32
    options = {"img_size": size, "embed_dim": 16, **(options or {"depth": 1, "num_heads": 2})}
    subject = load(timm.create_model(name, **options).eval())
    batch = subject.prepare(picture())
    assert subject.prefix_tokens == prefix and batch.args[0].shape[2:] == (size, size)
    assert batch.units.grid == (size // subject.patch[0],) * 2


# text


def test_a_row_of_a_batch_is_the_row_alone(gpt2_tokenizer):
    model = gpt2()
    for side in ("right", "left"):
        gpt2_tokenizer.padding_side = side
        subject = load(model, gpt2_tokenizer)
        batch = subject.prepare(TEXTS)
        assert (batch.kwargs["attention_mask"] == 0).any() and gpt2_tokenizer.pad_token is None
        targets = subject.targets(" film", 2)
        with torch.no_grad():
            together = targets.value(subject.forward(batch), batch)
            for row, text in enumerate(TEXTS):
                alone = subject.prepare(text)
                torch.testing.assert_close(
                    subject.targets(" film", 1).value(subject.forward(alone), alone), together[row : row + 1]
                )
    gpt2_tokenizer.padding_side = "right"


def test_decoder_that_classifies_finds_its_last_token(tmp_path, gpt2_tokenizer):
    gpt2("GPT2ForSequenceClassification").save_pretrained(tmp_path)
    gpt2_tokenizer.save_pretrained(tmp_path)
    subject = load(tmp_path)
    together = out(subject, TEXTS)
    torch.testing.assert_close(together, torch.cat([out(subject, text) for text in TEXTS]))


def test_masked_model_answers_at_its_mask(tokenizer):
    subject = load(bert("BertForMaskedLM"), tokenizer)
    assert subject.task == "fill-mask" and subject.mask_token_id == 4
    batch = subject.prepare(["a [MASK] film", "it"])
    assert batch.read.tolist() == [2, -1] and batch.last.tolist() == [4, 2]
    assert batch.units.words == [["a", "[MASK]", "film"], ["it"]]
    one = subject.prepare("a [MASK] film")
    output = subject.forward(one)
    assert subject.targets("fine", 1).value(output, one) == output.logits[0, 2, 6]


def test_encoder_and_decoder(tokenizer):
    import transformers

    config = transformers.T5Config(
        vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    subject = load(transformers.T5ForConditionalGeneration(config).eval(), tokenizer)
    batch = subject.prepare(TEXTS)
    assert batch.kwargs["decoder_input_ids"].tolist() == [[0], [0]]
    output = subject.forward(batch)
    assert torch.equal(subject.targets("fine", 2).value(output, batch), output.logits[:, 0, 6])


def test_pair_of_texts(tokenizer):
    subject = load(bert(), tokenizer)
    batch = subject.prepare(("a film", "so fine"))
    assert batch.kwargs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    assert batch.units.words == [["a", "film", "so", "fine"]]


def test_long_text_is_cut_aloud(tokenizer):
    subject = load(bert(), tokenizer)
    with pytest.warns(UserWarning, match="row 1 has 15 tokens, the model takes 12: 3 are cut off"):
        batch = subject.prepare(["a film", " ".join(["it"] * 13)])
    assert batch.kwargs["input_ids"].shape == (2, 12) and len(batch.units.words[1]) == 10
    with pytest.raises(ValueError, match="13 tokens, .* takes 12"):
        subject.prepare(torch.ones(1, 13, dtype=torch.long))


@pytest.mark.parametrize(
    "inputs, error, message",
    [
        ("", ValueError, "row 0 is empty"),
        (["a film", " \n"], ValueError, r"row 1 is empty \(' \\n'\)"),
        ([], ValueError, "the batch is empty"),
        (picture(), TypeError, "not Image; it is a text model, a picture is nothing to it"),
        (np.zeros((4, 4)), TypeError, "not ndarray; it is a text model"),
        (["a film", 3], TypeError, "takes a text, a list of texts.* not int"),
        (["a film", ("a", "film")], TypeError, "some rows are texts and some are pairs"),
        (
            torch.tensor([[1.0, 2.0]]),
            TypeError,
            r"token ids of dtype torch.float32 and shape \(1, 2\), expected integers",
        ),
        (torch.tensor([[1, 16]]), ValueError, "token ids from 1 to 16, the model has 0 to 15"),
        (torch.zeros(0, 3, dtype=torch.long), ValueError, "the batch is empty"),
        ({"input_ids": [[1, 2]]}, TypeError, "return_tensors='pt'"),
        (
            {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.zeros(1, 2)},
            ValueError,
            "with a token in each row",
        ),
        ({"inputs_embeds": torch.ones(1, 2, 16)}, ValueError, "give input_ids"),
        ({"pixels": torch.ones(1, 2)}, ValueError, "takes no argument pixels; it takes input_ids"),
        ({}, ValueError, "was given an empty mapping; it takes input_ids"),
    ],
)
def test_bad_text(tokenizer, inputs, error, message):
    with pytest.raises(error, match=message):
        load(bert(), tokenizer).prepare(inputs)


# pictures


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "HSV"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_clear_mode_is_converted(mode, channels):
    subject = load(vit(channels), plain(channels, (32, 32), [0.5] * channels, [0.5] * channels))
    batch = subject.prepare(picture(mode))
    assert batch.kwargs["pixel_values"].shape == (1, channels, 32, 32) and batch.units.images.shape == (1, 32, 32, 3)


def test_the_same_picture_in_every_form(tmp_path):
    subject = load(vit(), plain(3, (32, 32), [0.5] * 3, [0.25] * 3))
    image, array = picture(), np.array(picture())
    image.save(tmp_path / "image.png")
    batch = subject.prepare(
        [image, tmp_path / "image.png", str(tmp_path / "image.png"), array, array.astype("float32") / 255]
    )
    pixels = batch.kwargs["pixel_values"]
    assert torch.equal(pixels, pixels[:1].expand_as(pixels))
    for again in (
        subject.prepare(pixels),
        subject.prepare(list(pixels)),
        subject.prepare({"pixel_values": pixels}),
        subject.prepare(np.stack([array] * 5)),
    ):
        assert torch.equal(again.kwargs["pixel_values"], pixels) and again.units == batch.units and again.rows == 5


def test_pixels_take_the_dtype_of_the_model():
    subject = load(vit().to(torch.bfloat16), image_processor())
    assert subject.prepare(picture()).kwargs["pixel_values"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "inputs, error, message",
    [
        ("a fine film", ValueError, "no picture at 'a fine film'; an image model takes a path"),
        (__file__, ValueError, "is no picture that Pillow reads"),
        (3, TypeError, "not int"),
        ([], ValueError, "the batch is empty"),
        (torch.zeros(0, 3, 32, 32), ValueError, "the batch is empty"),
        (torch.zeros(1, 3, 16, 16), ValueError, r"pixels of shape \(1, 3, 16, 16\), expected \(B, 3, 32, 32\)"),
        (torch.zeros(1, 1, 32, 32), ValueError, r"expected \(B, 3, 32, 32\)"),
        (torch.zeros(32, 32), ValueError, r"pixels of shape \(32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "floating, not torch.uint8"),
        ([torch.zeros(3, 32, 32), torch.zeros(3, 16, 16)], ValueError, "in one batch"),
        (torch.full((1, 3, 32, 32), torch.nan), ValueError, "pixel_values has 3072 NaN or infinite"),
        (np.zeros((32, 32, 5)), ValueError, r"an array of shape \(32, 32, 5\) is no picture"),
        (np.full((32, 32), 7.0), ValueError, "values in 0 to 1, this one 7 to 7"),
        (np.full((32, 32), np.nan), ValueError, "NaN or infinite"),
        (np.zeros((32, 32), dtype=int), ValueError, "a picture of int64 is not clear"),
        (Image.new("I;16", (32, 32)), ValueError, "mode 'I;16' has more than 8 bits"),
        (Image.new("F", (32, 32)), ValueError, "mode 'F'"),
    ],
)
def test_bad_pictures(inputs, error, message):
    with pytest.raises(error, match=message):
        load(vit(), image_processor()).prepare(inputs)


def test_image_model_without_processor_takes_pixels():
    subject = load(vit())
    assert subject.prepare(torch.randn(2, 3, 32, 32)).units.images.shape == (2, 32, 32, 3)
    with pytest.raises(ValueError, match="how this model prepares pictures is not known"):
        subject.prepare(picture())
    with pytest.raises(ValueError, match="normalises 1 channels, the model takes 3"):
        load(vit(), image_processor(1))


# what cannot be loaded


@pytest.mark.parametrize(
    "name, message",
    [
        ("digit-vit", "no model 'digit-vit': no such folder, none of the bundled ones .* a hub id is org/name"),
        ("./nowhere", "no folder './nowhere'"),
        ("someone/nothing", "no model 'someone/nothing': no such folder, none of the bundled ones .* offline"),
        ("timm/vit_tiny_patch16_223", "timm has no model 'vit_tiny_patch16_223'; did you mean vit_tiny_patch16_"),
        ("", "no folder ''|no config.json"),
        (__file__, "is a file; give the folder"),
    ],
)
def test_unknown_models(name, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message) as raised:
        load(name)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif("digits-vit" not in zoo.names(), reason="digits-vit is not bundled yet")
def test_a_slip_in_a_bundled_name():
    with pytest.raises(ValueError, match=r"did you mean 'digits-vit'\?"):
        load("digit-vit")


def test_bad_options(tmp_path):
    for options, message in [
        ({"task": "summary"}, "no task 'summary'; there are text-classification"),
        ({"device": "gpu0"}, "no device"),
        ({"dtype": "int8"}, "no floating dtype 'int8'"),
        ({"dtype": "float7"}, "no floating dtype 'float7'"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(tmp_path, **options)
    with pytest.raises(TypeError, match="not int"):
        load(3)


@pytest.mark.parametrize(
    "config, message",
    [
        (None, "no config.json"),
        ("{", "is no JSON"),
        ("[]", "is a list, expected an object"),
        ('{"d_model": 3}', r"names no architecture \(it has d_model\)"),
        ('{"architectures": ["TheirOwnModel"]}', "TheirOwnModel of .* code that comes with a model is not run"),
        ('{"model_type": "bert"}', "names no architectures; give task="),
        ('{"architectures": ["BertModel"]}', "has no safetensors, no weights"),
    ],
)
def test_folders_that_are_no_models(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    model = gpt2(vocab_size=20)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"only pytorch_model.bin, which can run code .* GPT2LMHeadModel.from_pretrained"
    ):
        load(tmp_path)


def test_a_head_that_was_not_trained_is_refused(tmp_path):
    gpt2(vocab_size=20).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no weights for score.weight .* random"):
        load(tmp_path, task="text-classification")
    assert load(tmp_path, task="text-generation").task == "text-generation"


def test_broken_weights_are_named():
    subject = load(gpt2(vocab_size=20))
    subject.check_weights()
    with torch.no_grad():
        subject.model.transformer.h[0].mlp.c_fc.bias[3] = torch.nan
    with pytest.raises(ValueError, match=r"transformer.h.0.mlp.c_fc.bias of .* has 1 NaN or infinite values of 32"):
        subject.check_weights()


def test_half_precision_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="is in float16"):
        Subject.from_module(nn.Linear(2, 2).half()).prepare(torch.ones(1, 2).half())
