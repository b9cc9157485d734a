"""Models by name: bundled, in a folder, from the hub, of timm; or ones that are there already.

Only safetensors are read, no code that comes with a model is run, and the network is used for nothing but a hub id
(`org/name`, `timm/NAME`) that was asked for.
"""
from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from . import zoo
from .family import MODALITIES, arguments
from .pixels import plain
from .subject import Subject

# what transformers calls the head of a task; "feature-extraction" is the model without one
HEADS = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "fill-mask": "AutoModelForMaskedLM",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
    "image-text-to-text": "AutoModelForImageTextToText",
    "feature-extraction": "AutoModel",
}
ALIASES = {"ner": "token-classification", "sentiment-analysis": "text-classification"}  # as pipelines call them too
SHORT = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
Made = TypeVar("Made")


@dataclass(frozen=True)
class _Options:
    """How a model is made and what it is joined with."""

    processor: object
    task: str | None
    labels: Sequence[str] | None
    revision: str | None
    device: torch.device
    dtype: torch.dtype | None


def load(
    what: object,
    processor: object = None,
    *,
    task: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    labels: Sequence[str] | None = None,
) -> Subject:
    """A model with what is needed to explain it.

    Args:
        what: name of a bundled model; folder of a transformers or timm model; hub id `org/name`, or `timm/NAME`;
            pipeline of transformers; `(model, processor)`; or an `nn.Module`. A model that is there already is left as
            it is.
        processor: tokenizer, image processor or `Pixels`; without it, the one that comes with the model.
        task: which head, in the words of transformers' pipelines; without it, the one that was saved.
        device, dtype: where and in what precision the model is made; without them on the CPU, there in float32 and
            elsewhere as it was saved.
        revision: of a hub id.
        labels: names of the classes, instead of the model's own.
    Raises: ValueError for a name that is nowhere, a folder that cannot be read, weights other than safetensors, a head
        that was not saved, float16 on a CPU; ImportError if transformers or timm is missing; TypeError for no model.
    """
    if isinstance(what, tuple) and len(what) == 2:
        what, processor = what
    if isinstance(what, (str, Path)):
        device, dtype = _device(device), _dtype(dtype)
        if dtype == torch.float16 and device.type == "cpu":
            raise ValueError("float16 on a CPU is not precise enough to explain; use bfloat16 or float32, or a GPU")
        return _named(what, _Options(processor, _task(task), labels, revision, device, dtype))
    if (device, dtype, revision) != (None, None, None):
        raise ValueError("device, dtype and revision are for models that load makes; use model.to(...) on your own")
    if isinstance(what, Subject):
        return what
    if not isinstance(what, nn.Module) and isinstance(getattr(what, "task", None), str) and isinstance(
            getattr(what, "model", None), nn.Module):  # a pipeline
        processor = processor or _first(what, "tokenizer", "image_processor", "feature_extractor")
        what, task = what.model, task or what.task
    task = ALIASES.get(task, task)
    if not isinstance(what, nn.Module):
        raise TypeError(f"a model is a name, a folder, a pipeline, (model, processor) or an nn.Module, not "
                        f"{type(what).__name__}{_inside(what)}")
    return Subject.from_module(what, processor, task=task, labels=labels)


def _inside(what: object) -> str:
    """What to give instead of something that is no module but may have one."""
    held = vars(what) if hasattr(what, "__dict__") else {}
    name = next((name for name, value in held.items() if isinstance(value, nn.Module)), None)
    if name is not None:
        return (f"; it has one, .{name} ({type(held[name]).__name__}): give that, and as the target a function of its "
                "output for what the wrapper makes of it")
    if callable(what):
        return "; what is explained are the operations of a module, so give the one that this function calls"
    return ""


def _named(what: str | Path, options: _Options) -> Subject:
    folder, name = Path(what).expanduser(), str(what)
    if folder.is_dir() and name:
        return _from_folder(folder, folder.resolve().name, options)
    if name in zoo.names():
        return _from_folder(zoo.path(name), name, options)
    if folder.is_file():
        raise ValueError(f"{name} is a file; give the folder that it is in, with a config.json")
    if isinstance(what, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise ValueError(f"no folder {name!r}; give one with a config.json, or one of {', '.join(zoo.names())}")
    if name.startswith("timm/"):
        folder = _download(_timm_repository(name.removeprefix("timm/")), name, options.revision)
        return _from_folder(folder, name, replace(options, labels=options.labels or _imagenet(folder)))
    return _from_folder(_download(name, name, options.revision), name, options)


def _from_folder(folder: Path, name: str, options: _Options) -> Subject:
    config = _config(folder)
    if "architecture" in config:
        make = _from_kwargs if "kwargs" in config else _from_timm
        return make(folder, name, config, options)
    if "model_type" in config or config.get("architectures"):
        return _from_transformers(folder, name, config, options)
    raise ValueError(f"{folder}/config.json names no architecture (it has {', '.join(list(config)[:8])}), so it is of "
                     "neither transformers nor timm; build the model and give load(model, processor)")


def _config(folder: Path) -> dict:
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"{folder} is an adapter; load it with peft, and give load(model, tokenizer)")
        raise ValueError(f"no config.json in {folder}; save the model there with save_pretrained")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as cause:
        raise ValueError(f"{file} is no JSON ({cause})") from cause
    if not isinstance(config, dict):
        raise ValueError(f"{file} is a {type(config).__name__}, expected an object")
    return config


def _from_transformers(folder: Path, name: str, config: dict, options: _Options) -> Subject:
    kind = _kind(folder, config, options.task)
    convert = f"{kind.__name__}.from_pretrained(folder, use_safetensors=False).save_pretrained(folder)"
    _check_weights(folder, convert, named="*.safetensors")
    dtype = options.dtype or (torch.float32 if options.device.type == "cpu" else "auto")
    model, found = _or_say(f"{folder} cannot be loaded as {kind.__name__}", lambda: kind.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True))
    if found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise ValueError(f"{folder} has no weights for {missing} of {type(model).__name__}, so they are random and "
                         "there is nothing to explain; give the task it was trained for")
    model = model.to(options.device).eval()
    both = {"input_ids", "pixel_values"} <= set(arguments(model))
    processor = options.processor or _processor(folder, MODALITIES.get(model.main_input_name), both=both)
    subject = Subject.from_module(model, processor, name=name, task=options.task, labels=options.labels)
    if subject.task == "text-classification" and getattr(model.config, "pad_token_id", 0) is None:
        model.config.pad_token_id = subject.pad_token_id  # a decoder finds the last token of a row by it
    return subject


def _kind(folder: Path, config: dict, task: str | None) -> type:
    """The class to load: for the task, or the one that was saved."""
    transformers = _library("transformers")
    if task is not None:
        return getattr(transformers, HEADS[task])
    named = config.get("architectures") or []
    if not named:
        raise ValueError(f"{folder}/config.json names no architectures; give task=, one of {', '.join(HEADS)}")
    kind = getattr(transformers, named[0], None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"{named[0]} of {folder} is no class of transformers, and code that comes with a model is not "
                         "run; build the model yourself and give load(model, processor)")
    return kind


def _processor(folder: Path, modality: str | None, *, both: bool = False) -> object | None:
    """The tokenizer or image processor in a folder, or the processor of `both`; None if there is none."""
    transformers = _library("transformers")
    kinds = {"text": TOKENIZER_FILES, "image": IMAGE_FILES}
    there = {kind for kind, files in kinds.items() if any(next(folder.glob(pattern), None) for pattern in files)}
    if modality not in there and not (both and len(there) == 2):
        return None  # asked for one, transformers would make an empty tokenizer from the config
    auto = transformers.AutoTokenizer if modality == "text" else transformers.AutoImageProcessor
    auto = transformers.AutoProcessor if both and len(there) == 2 else auto
    made = _or_say(f"the {auto.__name__[4:].lower()} in {folder} cannot be loaded",
                   lambda: auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    return None if getattr(made, "vocab_size", None) == 0 else made


def _from_timm(folder: Path, name: str, config: dict, options: _Options) -> Subject:
    """A folder as timm's `save_for_hf` writes it."""
    timm = _library("timm")
    _check_weights(folder, "timm.models.save_for_hf(model, folder, safe_serialization=True)")
    model = _or_say(f"{folder} cannot be loaded as timm's {config['architecture']}",
                    lambda: timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True))
    model = model.to(options.device, options.dtype).eval()
    labels = config.get("label_names") if options.labels is None else options.labels
    return Subject.from_module(model, options.processor, name=name, task=options.task, labels=labels)


def _from_kwargs(folder: Path, name: str, config: dict, options: _Options) -> Subject:
    """A folder whose config has a timm class and its arguments, and may have labels, mean, std, input_size and problem.

    Without mean and std, pictures go in as they are, from 0 to 1.
    """
    timm = _library("timm")
    from safetensors.torch import load_file

    kind = getattr(timm.models, config["architecture"].rsplit(".", 1)[-1], None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"no class {config['architecture']!r} in timm.models; is it of another version of timm?")
    _check_weights(folder, "safetensors.torch.save_file(model.state_dict(), folder / 'model.safetensors')")
    # drawing random weights that are replaced at once would take most of the time
    skip = {"weight_init": "skip"} if "weight_init" in inspect.signature(kind).parameters else {}
    make = partial(kind, **{**config["kwargs"], **skip})
    model = _or_say(f"{folder} cannot be loaded as {config['architecture']}", make)
    weights = load_file(folder / "model.safetensors")
    _or_say(f"the weights in {folder} do not fit", lambda: model.load_state_dict(weights))
    model = model.to(options.device, options.dtype).eval()
    channels = config["kwargs"].get("in_chans", 3)
    size = config.get("input_size", [channels, *model.patch_embed.img_size])[1:]
    pixels = plain(channels, tuple(size), config.get("mean", [0.0] * channels), config.get("std", [1.0] * channels))
    labels = config.get("labels") if options.labels is None else options.labels
    task = options.task or "image-classification"
    subject = Subject.from_module(model, options.processor or pixels, name=name, task=task, labels=labels)
    return replace(subject, multilabel=config.get("problem") == "multi_label")


def _check_weights(folder: Path, convert: str, *, named: str = "model.safetensors") -> None:
    if next(folder.glob(named), None) is None:
        pickled = (".bin", ".pt", ".pth", ".ckpt", ".h5")
        others = sorted(file.name for file in folder.iterdir() if file.suffix in pickled)
        what = f"only {', '.join(others)}, which can run code when it is read" if others else "no weights"
        raise ValueError(f"{folder} has no safetensors, {what}; where you trust them, convert them once with {convert}")


def _download(repository: str, name: str, revision: str | None) -> Path:
    """Folder of a hub repository in the cache, its small files and its safetensors fetched if they are not there.

    A name without an owner is looked up in the cache only: it is more often a slip than a model.
    """
    from huggingface_hub import snapshot_download

    fetch = {"revision": revision, "ignore_patterns": ["*/*"], "local_files_only": "/" not in repository or _offline()}
    try:
        folder = Path(snapshot_download(repository, allow_patterns=["*.json", "*.txt", "*.model", "*.jinja"], **fetch))
        index = folder / "model.safetensors.index.json"
        shards = json.loads(index.read_text())["weight_map"].values() if index.is_file() else ["model.safetensors"]
        return Path(snapshot_download(repository, allow_patterns=sorted(set(shards)), **fetch))
    except (OSError, ValueError) as cause:  # what huggingface_hub raises for no network, no repository, no such name
        raise ValueError(_nowhere(name, repository, cause)) from cause


def _nowhere(name: str, repository: str, cause: Exception) -> str:
    bundled = zoo.names()
    close = difflib.get_close_matches(name.lower(), bundled, n=1, cutoff=0.5)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    if "/" not in repository:
        where = "and not in the cache of the hub; a hub id is org/name"
    elif _offline():
        where = "and not in the cache of the hub, which is offline (HF_HUB_OFFLINE)"
    else:
        where = f"and the hub does not give it ({type(cause).__name__})"
    return f"no model {name!r}: no such folder, none of the bundled ones ({', '.join(bundled)}), {where}{meant}"


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _timm_repository(name: str) -> str:
    """Hub id of the weights that timm has for a name.

    Raises: ValueError for a name that timm does not know, with the nearest it does.
    """
    timm = _library("timm")
    config = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name) else None
    if config is None:
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"timm has no model {name!r}{'; did you mean ' + ' or '.join(close) + '?' if close else ''}")
    if not config.hf_hub_id:
        raise ValueError(f"timm has no weights on the hub for {name!r}; give a name of timm.list_pretrained()")
    return config.hf_hub_id


def _imagenet(folder: Path) -> list[str] | None:
    """Labels of one of timm's own models, where its number of classes says that it knows ImageNet's."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    config = _config(folder)
    subset = None if config.get("label_names") else infer_imagenet_subset(config)
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(index) for index in range(info.num_classes())]


def _task(task: str | None) -> str | None:
    task = ALIASES.get(task, task)
    if task is not None and task not in HEADS:
        raise ValueError(f"no task {task!r}; there are {', '.join(HEADS)}")
    return task


def _device(device: str | torch.device | None) -> torch.device:
    """The device, if torch can put something on it; what torch raises otherwise depends on its build."""
    try:
        return torch.empty(0, device="cpu" if device is None else device).device
    except (RuntimeError, AssertionError, NotImplementedError) as cause:
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        if reason.startswith(("Expected one of", "Invalid device")):
            raise ValueError(f"no device {str(device)!r}; give cpu, cuda, cuda:0 or mps") from cause
        raise ValueError(f"device {str(device)!r} cannot be used here: {reason}") from cause


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, SHORT.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"no floating dtype {dtype!r}; give float32, float64, bfloat16 or float16")
    return found


def _library(name: str) -> object:
    try:
        return __import__(name)
    except ImportError as cause:
        raise ImportError(f"this is a model of {name}; pip install {name}") from cause


def _or_say(what: str, make: Callable[[], Made]) -> Made:
    """What `make` makes; an error of a library below gets the context once, in a line."""
    try:
        return make()
    except ImportError:
        raise
    except Exception as cause:
        first = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        raise ValueError(f"{what}: {first}") from cause


def _first(owner: object, *names: str) -> object | None:
    return next((found for name in names if (found := getattr(owner, name, None)) is not None), None)
