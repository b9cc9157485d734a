"""The bundled models: small, real, trained by `demos/train_*.py`, so that everything can be tried without a download.

A model is a folder of safetensors and JSON beside this file, with a card (`README.md`): what it was trained on.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast

_HERE = Path(__file__).parent


def names() -> list[str]:
    """Names of the bundled models.

    >>> names()
    ['digits-vit', 'reviews-bert', 'tasks-gpt2']
    """
    return sorted(folder.parent.name for folder in _HERE.glob("*/config.json"))


def path(name: str) -> Path:
    """Folder of a bundled model.

    Raises: ValueError for a name that is not in `names()`.
    """
    if name not in names():
        raise ValueError(f"no bundled model {name!r}; there are {', '.join(names())}")
    return _HERE / name


def config(name: str) -> dict:
    """What the model's `config.json` says: of a timm model its arguments, labels, normalisation and accuracy."""
    return json.loads((path(name) / "config.json").read_text())


def build(name: str) -> tuple[nn.Module, PreTrainedTokenizerFast | None]:
    """A bundled model in evaluation mode, and its tokenizer if it reads text.

    Images go into a timm model as `(image - mean) / std`, with the `mean` and `std` of `config(name)`.

    Raises: ValueError for a name that is not in `names()`; ImportError if timm or transformers is needed and missing.
    """
    folder = path(name)
    if config(name).get("library") == "timm":
        return _timm(folder, config(name)), None
    return _transformers(folder, config(name))


def _timm(folder: Path, about: dict) -> nn.Module:
    try:
        import timm.models.vision_transformer as architectures
    except ImportError as cause:
        raise ImportError(f"{folder.name} is a timm model; pip install timm") from cause
    from safetensors.torch import load_file

    model = getattr(architectures, about["architecture"])(**about["kwargs"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def _transformers(folder: Path, about: dict) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    try:
        import transformers
    except ImportError as cause:
        raise ImportError(f"{folder.name} is a transformers model; pip install transformers") from cause
    import torch

    # The file is half precision, for its size; computing is in float32. Nothing may be looked up outside the folder.
    kind = getattr(transformers, about["architectures"][0])
    model = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
