"""Inputs with the ground truth that an explanation should find, by name, or from files of the user's own.

    >>> from relprop.data import get
    >>> data = get("digits", count=2)
    >>> data.name, len(data), data.examples[0].marked.shape
    ('digits', 2, torch.Size([54, 54]))
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .alignment import differing
from .answer import squad
from .canvas import digits, mnist
from .classfolder import imagefolder, textfolder
from .docstring import docstring
from .eraser import eraser
from .example import Data, Example
from .gender import pronouns
from .indirect import ioi
from .lines import SUFFIXES, counterparts, texts
from .matching import Matched, by_slots, matched
from .pair import Pair, Pairs
from .passage import passages
from .picture import pictures
from .planted import indirect_objects, planted_professions, year_spans
from .promptfile import prompts
from .pronoun import crows, winobias, winogender
from .repeat import induction
from .review import movies, sst
from .segmentation import segmentation
from .sequence import brackets, palindromes, sorted_lists
from .swap import CHANGES, swapped
from .template import professions, templates
from .year import greater_than

__all__ = [
    "DRAWN", "FILES", "MAKERS", "PAIRS", "SPOKEN", "Data", "Example", "Matched", "Pair", "Pairs", "brackets",
    "by_slots", "counterparts", "crows", "differing", "digits", "docstring", "eraser", "get", "greater_than",
    "imagefolder", "indirect_objects", "induction", "ioi", "matched", "mnist", "movies", "pairs", "palindromes",
    "passages", "pictures", "planted_professions", "professions", "prompts", "pronouns", "segmentation",
    "sorted_lists", "squad", "sst", "swapped", "templates", "textfolder", "texts", "winobias", "winogender",
    "year_spans",
]  # fmt: skip

MAKERS: dict[str, Callable[..., Data]] = {
    "digits": digits, "palindromes": palindromes, "brackets": brackets, "sorted-lists": sorted_lists,
}  # fmt: skip
"""Data that is drawn: `maker(count, seed=...)`."""
FILES: dict[str, Callable[..., Data]] = {
    "mnist": mnist, "movies": movies, "eraser": eraser, "sst": sst, "pictures": pictures, "segmentation": segmentation,
    "imagefolder": imagefolder, "texts": texts, "textfolder": textfolder, "passages": passages, "squad": squad,
}  # fmt: skip
"""Data that is read: `maker(path, count, seed=...)`."""
PAIRS: dict[str, Callable[..., Pairs]] = {
    "professions": professions, "winobias": winobias, "winogender": winogender, "crows": crows, "pairs": counterparts,
    "prompts": prompts,
}  # fmt: skip
"""Pairs that are read: `maker(path, count, seed=...)`."""
DRAWN: dict[str, Callable[..., Pairs]] = {
    **{f"digits-{change}": partial(swapped, change=change) for change in CHANGES},
    "indirect-objects": indirect_objects, "year-spans": year_spans, "planted-professions": planted_professions,
    "gender-bias": partial(planted_professions, counterfactual="opposite"),
}  # fmt: skip
"""Pairs that are drawn: `maker(count, seed=...)`; the first three for `digits-vit`, the others for `tasks-gpt2`."""
SPOKEN: dict[str, Callable[..., Pairs]] = {
    "ioi": ioi, "greater-than": greater_than, "docstring": docstring, "pronouns": pronouns, "induction": induction,
}  # fmt: skip
"""Pairs that are drawn for a tokenizer: `maker(tokenizer, count, seed=...)`."""


def get(what: str | Path | Data, *, count: int | None = 500, seed: int = 0) -> Data:
    """Data by what a user writes.

    Args: what: a name of `MAKERS`; NAME:PATH with a name of `FILES`, such as "mnist:data/mnist"; a folder of pictures
        with masks; a .jsonl file of texts; or `Data` already. count: how many examples; None: all there are, of drawn
        data 500. seed: of what is drawn.
    Raises: ValueError for what is none of these.
    """
    if isinstance(what, Data):
        return what if count is None or count >= len(what) else what.take(range(count))
    name, _, path = str(what).partition(":")
    if str(what) in MAKERS:
        return MAKERS[name](500 if count is None else count, seed=seed)
    if name in FILES and path:
        return FILES[name](path, count, seed=seed)
    if str(what).endswith(SUFFIXES) and Path(what).is_file():
        return texts(what, count, seed=seed)
    if Path(what).is_dir():
        return pictures(what, count, seed=seed)
    if name in FILES:
        raise ValueError(f"data {name!r} is read from files: give {name}:FOLDER")
    raise ValueError(f"no data {str(what)!r}: neither a folder of pictures, nor a .jsonl file, nor one of "
                     f"{', '.join(MAKERS)}, nor {', '.join(f'{known}:PATH' for known in FILES)}")


def pairs(what: str | Path | Pairs, *, count: int | None = None, seed: int = 0, tokenizer: object = None) -> Pairs:
    """Pairs of a base and a counterfactual by what a user writes.

    Args: what: a name of `DRAWN`, such as "digits-swap", or of `SPOKEN`, such as "ioi"; NAME:PATH with a name of
        `PAIRS`, such as "winobias:data/winobias"; a .jsonl file of pairs; or `Pairs` already. count: how many; None:
        all there are, of drawn ones 100. seed: of what is drawn. tokenizer: for what is drawn for one.
    Raises: ValueError for what is none of these.

    >>> pairs("digits-blur", count=2).pairs[0].facts["change"]
    'blur'
    """
    if isinstance(what, Pairs):
        return what if count is None or count >= len(what) else what.take(range(count))
    name, _, path = str(what).partition(":")
    if str(what) in DRAWN:
        return DRAWN[name](100 if count is None else count, seed=seed)
    if str(what) in SPOKEN:
        if tokenizer is None:
            raise ValueError(f"pairs {str(what)!r} are drawn for a tokenizer; give tokenizer=, which the model has to "
                             "come with")
        return SPOKEN[name](tokenizer, 100 if count is None else count, seed=seed)
    if name in PAIRS and path:
        return PAIRS[name](path, count, seed=seed)
    if str(what).endswith(SUFFIXES) and Path(what).is_file():
        return counterparts(what, count, seed=seed)
    raise ValueError(f"no pairs {str(what)!r}: neither a .jsonl file, nor one of {', '.join([*DRAWN, *SPOKEN])}, nor "
                     f"{', '.join(f'{known}:PATH' for known in PAIRS)}")
