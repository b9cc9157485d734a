"""What models of transformers read, by the names of their arguments: words, pictures, sounds.

Where pictures or sounds stand among the words, their places are held by tokens of their own, as many as the model
makes features of them: it is asked.
"""
from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_leaves

from ..still import settled
from .architecture import Inputs, value
from .description import heard, seen
from .picture import Painter
from .sound import Recorder
from .text import ANSWER, FIRST, LAST, ROWS, TEXTS, text

KINDS = {"image": 1, "video": 2, "audio": 3}
"""What stands among words, and what models of several senses call it in `mm_token_type_ids`."""
APART = ("target_sizes", "image_grids")
"""What there is one of for each picture beside pixels that cannot be taken apart by rows: one row is given."""
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
                output = value(model(**found))
            return _read(model, found, output)
        except Exception as error:  # whatever a model says of inputs that it cannot read
            first = first or error
    raise first


def _read(model: nn.Module, found: Named, output: Tensor) -> Named:
    """What was found without words that the model takes and does not read."""
    for name, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "")):
        if name in found and len(found) > 1:
            words = (found[name] >= FIRST) & (found[name] < LAST)  # marks stay
            other = {**found, name: torch.where(words, found[name] + 1, found[name])}
            with torch.no_grad(), settled(model):
                if not torch.equal(value(model(**other)), output):
                    continue
            left = {key: one for key, one in found.items() if key not in (name, mask)}
            found = left if _runs(model, left) else found
    return found


def _runs(model: nn.Module, found: Named) -> bool:
    try:
        with torch.no_grad(), settled(model):
            model(**found)
    except Exception:
        return False
    return True


def layouts(task: str, model: nn.Module) -> Iterator[Named]:
    """What the model may read, the likeliest first."""
    accepted = set(inspect.signature(model.forward).parameters)
    generator = torch.Generator().manual_seed(1)
    words = text(task, model, generator) if "input_ids" in accepted else _answer(accepted, generator)
    if hasattr(model.config, "max_state_dim"):
        words |= {name: make(model.config, generator) for name, make in _STATES.items() if name in accepted}
    sounds = [*Recorder(accepted, heard(model.config), ROWS, generator).layouts()]
    for seeing in _taken(model, "image", Painter(accepted, seen(model.config), ROWS, generator).layouts()):
        for hearing in _taken(model, "audio", sounds):
            found = _placed(model, accepted, words, {**seeing, **hearing})
            yield found
            if (told := _told(model, found)) is not None:
                yield _placed(model, accepted, words, {**seeing, **hearing}, told)
    if task in TEXTS:  # pictures are something besides
        yield words


_STATES = {
    "state": lambda config, generator: torch.randn(ROWS, config.max_state_dim, generator=generator),
    "noise": lambda config, generator: torch.randn(ROWS, config.chunk_size, config.max_action_dim, generator=generator),
    "timestep": lambda config, generator: torch.rand(ROWS, generator=generator),
}
"""What models of robots read besides: where joints are, and the movements that they make out of noise."""


def _told(model: nn.Module, found: Named) -> int | None:
    """How many tokens a row the model misses for its features of pictures, if that is what it says."""
    try:
        with torch.no_grad(), settled(model):
            model(**found)
    except Exception as error:
        said = re.search(r"tokens: \d+, features:? (\d+)", str(error))
        return None if said is None else int(said[1]) // ROWS
    return None


def _rows(media: Named) -> int:
    """How many rows pictures and sounds are of."""
    return next((len(media[name]) for name in APART if name in media), ROWS)


def _taken(model: nn.Module, kind: str, several: Iterable[Named]) -> Iterator[Named]:
    """Several layouts, those first of which the model can make features by itself; nothing at all where there are none.
    """
    others, found = [], False
    for one in several:
        found = True
        if _features(model, kind, one):
            yield one
        else:
            others.append(one)
    yield from others
    if not found:
        yield {}


def _placed(model: nn.Module, accepted: set[str], words: Named, media: Named, images: int | None = None) -> Named:
    """The words, and among them tokens that hold the places of pictures and sounds, where the model has such.

    `images`: how many of a picture, where that is known.
    """
    if "input_ids" not in words:
        return {**words, **media}
    rows = _rows(media)
    words = {name: one[:rows] for name, one in words.items()}
    held, latents = {}, seen(model.config).number("latent_query_num", default=0)
    for kind in KINDS:
        token = seen(model.config).token(kind)
        told = images if kind == "image" else None
        count = told or _features(model, kind, media) if token is not None else None
        if count:
            held[token] = kind, torch.full((rows, count), token)
    if not held:
        return {**words, **media, **_seen(accepted, words["input_ids"], media, latents)}
    ids = words["input_ids"]
    ids = torch.cat([ids[:, :BEFORE], *(place for _, place in held.values()), ids[:, BEFORE:]], 1)
    kinds = sum((ids == token) * KINDS[kind] for token, (kind, _) in held.items())
    beside = {"mm_token_type_ids": kinds, "token_type_ids": kinds.clamp(max=1)}
    if "attention_mask" in words:
        mask = words["attention_mask"]
        beside["attention_mask"] = torch.cat([mask.new_ones(rows, ids.shape[1] - mask.shape[1]), mask], 1)
    return {**words, "input_ids": ids, **media, **_seen(accepted, ids, media, latents),
            **{name: one for name, one in beside.items() if name in accepted}}


def _seen(accepted: set[str], ids: Tensor, media: Named, latents: int) -> Named:
    """Which words look at which pictures, where a model asks for it: all at all. Or in which places there are pictures,
    of `latents` features each.
    """
    if media and "image_embeds_position_mask" in accepted:
        where = torch.zeros_like(ids)
        where[:, BEFORE:BEFORE + latents] = 1
        return {"image_embeds_position_mask": where}
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
    made = _made(model, extract, given)
    if made is None:  # perhaps of one picture a row
        made = _made(model, extract, {name: one.flatten(0, 1) if one.dim() == 5 else one for name, one in given.items()
                                      if isinstance(one, Tensor)})
    parts = (getattr(made, name, None) for name in ("pooler_output", "last_hidden_state"))
    made = next((part for part in parts if part is not None), made)
    if made is None:
        return None
    tensors = [one for one in tree_leaves(made) if isinstance(one, Tensor) and one.is_floating_point()]
    return sum(one.numel() // one.shape[-1] for one in tensors) // _rows(media)


def _made(model: nn.Module, extract: Any, given: Named) -> Any:
    """What the model's own function makes, None where it refuses the layout."""
    try:
        with torch.no_grad(), settled(model):
            return extract(**given)
    except Exception:
        return None
