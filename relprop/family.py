"""What is known of model families beyond PyTorch: the one place that asks what kind of model it has.

Facts come from the model's own description (the config of transformers, the attributes of timm) where it has them;
the tables hold the rest.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .pixels import Pixels, from_timm

# parameters of tokens that a vision transformer puts in front of its patches, by the last part of their name
CLASS = ("cls_token", "class_token", "class_embedding")
PREFIX = (*CLASS, "dist_token", "distillation_token", "reg_token", "register_tokens")
# families whose class token joins only after the layers that see patches
LATE_CLASS = ("Cait",)
# families that count positions from the first token that is not padding by themselves
OWN_POSITIONS = ("camembert", "data2vec-text", "esm", "ibert", "longformer", "mpnet", "opt", "roberta",
                 "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod")
# of these, positions start behind the padding's own, so that fewer tokens fit than there are positions
OFFSET_POSITIONS = tuple(name for name in OWN_POSITIONS if name != "opt")
# modules that run another one as it is, and where they keep it
WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
# classes of layers that other layers were put into, which together are one map of what they read
ADAPTED = ("BaseTunerLayer",)
# transformers' tables of classes by task, and what its pipelines call the task; the first that lists a class counts
TASKS = {
    "SEQUENCE_CLASSIFICATION": "text-classification",
    "TOKEN_CLASSIFICATION": "token-classification",
    "QUESTION_ANSWERING": "question-answering",
    "IMAGE_CLASSIFICATION": "image-classification",
    "SEQ_TO_SEQ_CAUSAL_LM": "text2text-generation",  # before the next, which lists BART too
    "IMAGE_TEXT_TO_TEXT": "image-text-to-text",  # before the next, which lists some of them too
    "MASKED_LM": "fill-mask",
    "CAUSAL_LM": "text-generation",
}
# what configs call the token that holds the place of a piece of a picture
SIGNS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
MODALITIES = {"input_ids": "text", "pixel_values": "image"}  # by the name of a model's main input


@dataclass(frozen=True, eq=False)
class Facts:
    """What a model says of itself; None: nothing."""

    name: str
    modality: str = "tensors"
    task: str | None = None
    labels: tuple[str, ...] | None = None
    classes: int | None = None
    multilabel: bool = False
    regression: bool = False
    channels: int = 3
    size: tuple[int, int] | None = None
    patch: tuple[int, int] | None = None
    prefix_tokens: int = 0
    pixels: Pixels | None = None


def facts(model: nn.Module) -> Facts:
    """What a model of transformers or timm, or any other, says of itself."""
    if _config(model) is not None:
        return _transformers(model)
    if getattr(model, "pretrained_cfg", None):
        return _timm(model)
    patch, _ = _patches(model)
    return Facts(type(model).__name__, patch=patch, prefix_tokens=prefix_tokens(model))


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of wrappers that run it as it is, in a process or on a device of their own."""
    while inner := next((WRAPPERS[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in WRAPPERS), None):
        model = getattr(model, inner)
    return model


def device(model: nn.Module) -> torch.device:
    """Where the model's first parameter is when it is used: what accelerate keeps elsewhere is brought there."""
    found = next((p.device for p in model.parameters()), torch.device("cpu"))
    if found.type != "meta":
        return found
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    every = [one for hook in hooks if hook is not None for one in (hook, *getattr(hook, "hooks", ()))]
    named = next((one.execution_device for one in every if getattr(one, "execution_device", None) is not None), found)
    return torch.device("cuda", named) if isinstance(named, int) else torch.device(named)


def fetched(module: nn.Module, weight: Tensor) -> Callable[[], Tensor] | None:
    """What brings a module's weight to where it is used once more, if accelerate keeps it elsewhere in between; None
    for one that stays.
    """
    hook = getattr(module, "_hf_hook", None)
    hook = next((one for one in (hook, *getattr(hook, "hooks", ())) if getattr(one, "offload", False)), None)
    name = next((name for name, own in module._parameters.items() if own is weight), None)
    if hook is None or name is None:
        return None
    device, dtype = weight.device, weight.dtype
    return lambda: hook.weights_map[name].to(device, dtype)


def offloaded(model: nn.Module) -> bool:
    """Whether accelerate brings some of a model's weights to where they are used, and takes them away again."""
    return any(getattr(one, "offload", False) for module in model.modules() if hasattr(module, "_hf_hook")
               for one in (module._hf_hook, *getattr(module._hf_hook, "hooks", ())))


def adapted(module: nn.Module) -> bool:
    """Whether a module is a layer with what an adapter added to it, such as LoRA's two matrices."""
    return any(kind.__name__ in ADAPTED for kind in type(module).__mro__)


def prefix_tokens(model: nn.Module) -> int:
    """Number of class, distillation and register tokens in front of the patches; 0 of a model without patches."""
    if any(kind.__name__ in LATE_CLASS for kind in type(model).__mro__):
        return 0
    said = getattr(model, "num_prefix_tokens", None)
    if said is not None:
        return said
    known = {name: value for name, value in model.named_parameters() if name.rsplit(".", 1)[-1] in PREFIX}
    return sum(value.shape[-2] if value.dim() > 1 else 1 for value in known.values())


def arguments(model: nn.Module) -> tuple[str, ...]:
    """Names of what `forward` takes; none if it takes whatever it is given."""
    parameters = inspect.signature(model.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def pixel_argument(model: nn.Module) -> str | None:
    """Name of the argument for pixels, None if they are the first."""
    return "pixel_values" if "pixel_values" in arguments(model) else None


def signs(model: nn.Module) -> tuple[int, ...]:
    """Ids of the tokens that hold the places of pictures among words, as the config says them."""
    config = _config(model)
    known = [getattr(config, name, None) for name in SIGNS]
    return tuple(sorted({one for one in known if isinstance(one, int)}))


def takes_positions(model: nn.Module) -> bool:
    """Whether positions have to be given where padding is on the left."""
    config = _config(model)
    return "position_ids" in arguments(model) and (config is None or config.model_type not in OWN_POSITIONS)


def cache_argument(model: nn.Module) -> str | None:
    """Name of the argument, and of the output, for the keys and values of earlier positions; None if it keeps none."""
    accepted = arguments(model)
    if "input_ids" not in accepted or "use_cache" not in accepted:
        return None
    return next((name for name in ("cache", "past_key_values") if name in accepted), None)


def longest(model: nn.Module, tokenizer: object | None) -> int | None:
    """Number of tokens a model takes, by its config and its tokenizer; None: no limit known."""
    config = _config(model)
    said = getattr(config, "max_position_embeddings", None)
    if isinstance(said, int) and said > 0 and config.model_type in OFFSET_POSITIONS:
        said -= (config.pad_token_id or 0) + 1
    limits = [limit for limit in (said, getattr(tokenizer, "model_max_length", None)) if isinstance(limit, int)]
    return min((limit for limit in limits if 0 < limit < 10**9), default=None)  # tokenizers say 10^30 for none


def cut(model: nn.Module) -> tuple[tuple[int, int] | None, int]:
    """Of a model of pictures and text: the patch that it cuts pictures into, (Py, Px), None if it does not say, and how
    many entries of its pixels there are for each of their places: channels, and frames that a still picture fills.
    """
    config = _config(model)
    seeing = next((part for name in ("vision_config", "vision_tower_config", "vit_config", "perceiver_config")
                   if (part := getattr(config, name, None)) is not None), config)
    channels = next((value for name in ("num_channels", "in_channels", "in_chans")
                     if isinstance(value := getattr(seeing, name, None), int)), 3)
    frames = getattr(seeing, "temporal_patch_size", 1)
    return _pair(getattr(seeing, "patch_size", None)), channels * (frames if isinstance(frames, int) else 1)


def vocabulary_size(model: nn.Module) -> int | None:
    """Number of token ids that a model has an embedding for."""
    if _config(model) is None:
        return None
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # of several inputs, such as CLIP
        return None


def decoder_start(model: nn.Module) -> int:
    """Id of the token that a decoder starts with."""
    config = _config(model)
    known = [getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id")]
    return next((one for one in known if isinstance(one, int)), 0)


def _config(model: nn.Module) -> object | None:
    config = getattr(model, "config", None)
    return config if hasattr(config, "model_type") else None


def _transformers(model: nn.Module) -> Facts:
    config = _config(model)
    modality = MODALITIES.get(getattr(model, "main_input_name", None), "tensors")
    task = _task(model)
    classifies = task.endswith("classification")
    named = classifies and config.id2label  # configs of some families have none
    labels = tuple(str(named[i]) for i in sorted(named)) if named else None
    channels, size, patch = getattr(config, "num_channels", 3), _pair(getattr(config, "image_size", None)), None
    if modality == "image":
        patch = _pair(getattr(config, "patch_size", None))
    bound = "interpolate_pos_encoding" in arguments(model) and getattr(config, "use_absolute_embeddings", True)
    size = size if bound else None
    pixels = Pixels(channels, size) if modality == "image" else None
    name = getattr(config, "_name_or_path", "")
    name = Path(name).name if Path(name).is_dir() else name  # where a folder lay is nothing for a report
    return Facts(name=name or type(model).__name__, modality=modality, task=task,
                 labels=labels, classes=len(labels) if labels else None,
                 multilabel=getattr(config, "problem_type", None) == "multi_label_classification",
                 regression=getattr(config, "problem_type", None) == "regression",
                 channels=channels, size=size, patch=patch, pixels=pixels,
                 prefix_tokens=prefix_tokens(model) if modality == "image" else 0)


def _timm(model: nn.Module) -> Facts:
    from timm.data import resolve_model_data_config

    about = model.pretrained_cfg
    patch, size = _patches(model)
    convolution = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    channels = getattr(model, "in_chans", None) or (convolution.in_channels if convolution else 3)
    pixels = from_timm(resolve_model_data_config(model), channels, size)
    classes = getattr(model, "num_classes", None) or None
    labels = about.get("label_names")
    labels = tuple(map(str, labels)) if labels and len(labels) == classes else None
    return Facts(name=about.get("architecture") or type(model).__name__, modality="image", task="image-classification",
                 labels=labels, classes=classes, channels=channels, size=size, patch=patch, pixels=pixels,
                 prefix_tokens=prefix_tokens(model))


def _patches(model: nn.Module) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """The patch of a timm model, and the size of input it is bound to."""
    embedding = getattr(model, "patch_embed", None) or getattr(model, "embeds", None)
    patch = _pair(getattr(embedding, "patch_size", None))
    size = _pair(getattr(embedding, "img_size", None)) if getattr(embedding, "strict_img_size", True) else None
    return patch, size


def _task(model: nn.Module) -> str:
    """What a transformers model does, by the library's own tables; a head that none of them lists counts as none.

    Of a wrapped model (PEFT), what the model inside does.
    """
    from transformers.models.auto import modeling_auto

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = {kind.__name__ for kind in type(inner).__mro__}
    for table, task in TASKS.items():
        for name in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").values():
            if kinds & ({name} if isinstance(name, str) else set(name)):
                return task
    return "feature-extraction"


def _pair(value: object) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, Mapping):
        value = (value.get("height"), value.get("width"))
    pair = tuple(value) if isinstance(value, (tuple, list)) else ()
    return pair if len(pair) == 2 and all(isinstance(side, int) for side in pair) else None
