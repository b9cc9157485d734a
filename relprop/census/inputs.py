"""What models of transformers read, by the names of their arguments: words, pictures, sounds.

Where pictures or sounds stand among the words, their places are held by tokens of their own, as many as the model
makes features of them: it is asked.
"""
from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_leaves

from ..still import settled
from .architecture import Inputs
from .description import heard, seen
from .picture import Painter
from .sound import Recorder
from .text import ANSWER, FIRST, LAST, ROWS, TEXTS, text

KINDS = {"image": 1, "video": 2, "audio": 3}
"""What stands among words, and what models of several senses call it in `mm_token_type_ids`."""
BEFORE = 4
"""Words in front of a picture or a sound."""

Named = dict[str, Any]


def inputs(task: str, model: nn.Module) -> Inputs:
    """Two rows of what a model of a task of transformers reads, by the names of its arguments: the first of the layouts
    that the names allow that the model takes.

    Raises: what the model raises at the likeliest layout if it takes none.
    """
    first: Exception | None = None
    for found in layouts(task, model):
        try:
            with torch.no_grad(), settled(model):
                model(**found)
            return found
        except Exception as error:  # whatever a model says of inputs that it cannot read
            first = first or error
    raise first


def layouts(task: str, model: nn.Module) -> Iterator[Named]:
    """What the model may read, the likeliest first."""
    accepted = set(inspect.signature(model.forward).parameters)
    generator = torch.Generator().manual_seed(1)
    words = text(task, model, generator) if "input_ids" in accepted else _answer(accepted, generator)
    pictures = _taken(model, "image", Painter(accepted, seen(model.config), ROWS, generator).layouts())
    sounds = _taken(model, "audio", Recorder(accepted, heard(model.config), ROWS, generator).layouts())
    for seeing, hearing in product(pictures, sounds):
        yield _placed(model, accepted, words, {**seeing, **hearing})
    if task in TEXTS:  # pictures are something besides
        yield words


def _taken(model: nn.Module, kind: str, several: Iterable[Named]) -> list[Named]:
    """Several layouts, those first of which the model can make features by itself."""
    return sorted(several, key=lambda one: not _features(model, kind, one)) or [{}]


def _placed(model: nn.Module, accepted: set[str], words: Named, media: Named) -> Named:
    """The words, and among them tokens that hold the places of pictures and sounds, where the model has such."""
    held = {}
    for kind in KINDS:
        token = seen(model.config).token(kind)
        count = _features(model, kind, media) if token is not None and "input_ids" in words else None
        if count:
            held[token] = kind, torch.full((ROWS, count), token)
    if "input_ids" not in words:
        return {**words, **media}
    if not held:
        return {**words, **media, **_seen(accepted, words["input_ids"], media)}
    ids = words["input_ids"]
    ids = torch.cat([ids[:, :BEFORE], *(place for _, place in held.values()), ids[:, BEFORE:]], 1)
    kinds = sum((ids == token) * KINDS[kind] for token, (kind, _) in held.items())
    beside = {"mm_token_type_ids": kinds, "token_type_ids": kinds.clamp(max=1)}
    if "attention_mask" in words:
        mask = words["attention_mask"]
        beside["attention_mask"] = torch.cat([mask.new_ones(ROWS, ids.shape[1] - mask.shape[1]), mask], 1)
    return {**words, "input_ids": ids, **media, **_seen(accepted, ids, media), **{name: one for name, one in beside.items() if name in accepted}}


def _seen(accepted: set[str], ids: Tensor, media: Named) -> Named:
    """Which words look at which pictures, where a model asks for it: all at all."""
    pictures = media.get("pixel_values")
    if pictures is None:
        return {}
    several = pictures.shape[1:-3]
    shapes = {"image_attention_mask": (*ids.shape, *several[:1]), "cross_attention_mask": (*ids.shape, *several)}
    return {name: torch.ones(shape, dtype=torch.long) for name, shape in shapes.items() if name in accepted}


def _answer(accepted: set[str], generator: Generator) -> Named:
    """Words of a decoder behind an encoder of pictures or sounds."""
    if "decoder_input_ids" not in accepted:
        return {}
    return {"decoder_input_ids": torch.randint(FIRST, LAST, (ROWS, ANSWER), generator=generator)}


def _extractor(model: nn.Module, kind: str, media: Named) -> Any:
    """The model's own function that makes features of pictures, videos or sounds, by the part whose takes most of what
    there is.
    """
    several = [getattr(part, name) for part in model.modules() if hasattr(part, name := f"get_{kind}_features")]
    return max(several, key=lambda one: len(set(inspect.signature(one).parameters) & set(media)), default=None)


def _features(model: nn.Module, kind: str, media: Named) -> int | None:
    """How many features a row the model makes of pictures or sounds; None if it makes none of these."""
    extract = _extractor(model, kind, media)
    if extract is None:
        return None
    taken = inspect.signature(extract).parameters
    given = {name: value for name, value in media.items() if name in taken}
    if not given:
        return None
    said = {name: getattr(model.config, name, None) for name, one in taken.items()
            if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD and name not in given}
    given |= said
    try:
        with torch.no_grad(), settled(model):
            made = extract(**given)
    except Exception:  # not in this layout
        return None
    parts = (getattr(made, name, None) for name in ("pooler_output", "last_hidden_state"))
    made = next((part for part in parts if part is not None), made)
    tensors = [one for one in tree_leaves(made) if isinstance(one, Tensor) and one.is_floating_point()]
    return sum(one.numel() // one.shape[-1] for one in tensors) // ROWS
