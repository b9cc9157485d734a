"""The methods by name, and what of them can be asked: their options, addresses, and of which inputs they tell."""
from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from inspect import signature
from numbers import Integral, Real
from typing import Any

from . import attention, baselines, composite, latents, rows
from .composite import Composite
from .decompose import importance
from .lrp import by_composite
from .result import Relevance
from .subject import Subject
from .tokens import Batch

Method = Callable[..., Relevance]

METHODS: dict[str, Method] = {}
"""Every method by name: a function of a subject, a batch and targets to a `Relevance`, with its options by keyword.

One that passes through the layers has a keyword `at`, which is no option of the user's: a tuple of addresses without
positions, or patterns of them, "L*.attn.H*", none by default. For each place that they mean, as `Anatomy.resolve` lists
them, its result has an entry in `latents`, by the place's text: (B, T), or of attention patterns (B, T, S), at all
positions of the model. `explain(at=)` and `Explanation.at` ask for them, and pick positions themselves.
"""

COMPOSITES = tuple(name for name in composite.NAMES if name != "gradient")  # the plain gradient is a baseline
OF_BOTH = ("generic-attention", *baselines.OF_SEVERAL)
"""Methods besides composites that give maps of a text and of the pictures beside it."""
METHODS.update({name: partial(by_composite, composite.get(name)) for name in COMPOSITES})
METHODS.update(attention.METHODS)
METHODS.update(importance.METHODS)
METHODS.update(baselines.METHODS)


def compared(modality: str) -> list[str]:
    """Methods that are compared where none are named: the default of `composite.default`, and two that it should beat.

    >>> compared("image")[1:]
    ['rollout', 'integrated-gradients']
    """
    others = ["cp-lrp", "input-x-gradient"] if modality == "both" else ["rollout", "integrated-gradients"]
    return [composite.default(modality), *others]


def modality_of(subject: Subject, batch: Batch) -> str:
    """What the model takes; of a plain module, pictures where it is given pixels, (B, C, Y, X)."""
    given = subject.modality == "tensors" and rows.leaf(batch)[1].ndim == 4
    return "image" if given else subject.modality


def check_pictures(method: str | Composite, subject: Subject, batch: Batch) -> None:
    """Raises ValueError for a method that maps one input, where a model of texts and pictures is given both."""
    both = subject.modality == "both" and batch.pictures is not None
    if both and not isinstance(method, Composite) and method not in (*COMPOSITES, *OF_BOTH):
        raise ValueError(f"{method} explains one input, and here are a text and pictures; the methods that explain "
                         f"both are {', '.join((*COMPOSITES, *OF_BOTH))}")


def called(method: str | Composite) -> str:
    """A method's name."""
    return method.name if isinstance(method, Composite) else str(method)


def bound(method: str | Composite, *, options: dict[str, Any] | None = None, show_progress: bool = False,
          **of_composite: Any) -> Method:
    """The function that makes the map, its options bound; `of_composite`: arguments that composites alone take.

    Raises: TypeError or ValueError for what is no method, or an option that it does not have.
    """
    if not isinstance(method, (str, Composite)):
        raise TypeError(f"a method is a name or a Composite, not {type(method).__name__}; the names are "
                        f"{', '.join(METHODS)}")
    if isinstance(method, str) and method not in METHODS:
        close = get_close_matches(method.lower(), METHODS, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown method {method!r}; the methods are {', '.join(METHODS)}{meant}")
    if isinstance(method, Composite) or method in COMPOSITES:
        if options:
            raise ValueError(f"{called(method)} is a composite and has no option {', '.join(options)}; change its "
                             "rules with Composite.but")
        return partial(by_composite, composite.get(method), **of_composite)
    able = latents.answers(METHODS[method])
    names = ("spread_bias", "layers", "positions", "checkpoint") + (() if able else ("at",))
    asked = [name for name in names if of_composite.get(name)]
    if asked:
        others = _answering() if asked == ["at"] else COMPOSITES
        raise ValueError(f"{method} has no {', '.join(asked)}: it does not pass through the layers; "
                         f"the methods that do are {', '.join(others)}")
    given = {"at": of_composite["at"]} if of_composite.get("at") else {}
    return partial(METHODS[method], **given, **_options(method, options or {}, show_progress))


def _answering() -> list[str]:
    """The methods that answer for addresses."""
    return [name for name, method in METHODS.items() if name in COMPOSITES or latents.answers(method)]


_TYPES: dict[str, tuple[type, ...]] = {
    "int": (Integral,), "int | None": (Integral, type(None)), "float": (Real,), "bool": (bool,),
    "bool | None": (bool, type(None)), "str": (str,)}
"""What options of plain annotations take; those of others are checked where they are used."""


def _check_types(method: str, options: dict[str, Any], annotations: dict[str, Any]) -> None:
    """Raises TypeError for an option that is not what its annotation says; True is no number."""
    for name, value in options.items():
        wanted = _TYPES.get(annotations[name])
        if wanted is not None and (not isinstance(value, wanted) or isinstance(value, bool) and bool not in wanted):
            raise TypeError(f"{method}: {name} is of type {annotations[name]}, got {value!r}")


def _options(method: str, options: dict[str, Any], show_progress: bool) -> dict[str, Any]:
    """Options of a method that is no composite. Raises: ValueError for an unknown one, with those that it has."""
    parameters = signature(METHODS[method]).parameters.values()
    known = [parameter.name for parameter in parameters
             if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "at"]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"{method} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    _check_types(method, options, {parameter.name: parameter.annotation for parameter in parameters})
    return {"show_progress": show_progress, **options} if "show_progress" in known else options
