"""Explains transformers by layer-wise relevance propagation: conserved maps, with their books, checked by ablation.

    >>> import relprop
    >>> r = relprop.explain("reviews-bert", "A wonderful film.", target="POSITIVE")
    >>> max(r.words(0), key=lambda word: word[1])[0]
    'wonderful'
    >>> bool((r.ledger.error < 1e-4).all())
    True

Every name here is imported when it is first used, so that `import relprop` and `relprop --help` do not wait for torch.
"""
from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from . import (
        anatomy,
        approximation,
        attention,
        captum,
        check,
        composite,
        data,
        intervene,
        mediation,
        nn,
        ops,
        quantus,
        view,
        zoo,
    )
    from .address import Address
    from .benchmark import Benchmark, benchmark
    from .census import Census, census
    from .circuit import Task, circuit
    from .composite import Composite
    from .decompose import decompose
    from .division import Division
    from .errors import IndependentOutput, LedgerError, RelpropError, UnruledOp
    from .estimate import estimate
    from .explain import Comparison, Explanation, compare, explain, open
    from .load import load
    from .mediation import Effects, effects
    from .method import METHODS
    from .result import Circuit, Curve, Decomposition, Ledger, Relevance
    from .subject import Subject
    from .target import (
        Answer,
        Class,
        Contrast,
        End,
        Function,
        Prediction,
        Probability,
        Regression,
        Similarity,
        Span,
        Start,
        Tag,
        Target,
        Token,
    )

_HOME = {  # where each name is defined
    "errors": ("IndependentOutput", "LedgerError", "RelpropError", "UnruledOp"),
    "address": ("Address",),
    "target": ("Answer", "Class", "Contrast", "End", "Function", "Prediction", "Probability", "Regression",
               "Similarity", "Span", "Start", "Tag", "Target", "Token"),
    "result": ("Circuit", "Curve", "Decomposition", "Ledger", "Relevance"),
    "composite": ("Composite",),
    "decompose": ("decompose",),
    "division": ("Division",),
    "subject": ("Subject",),
    "load": ("load",),
    "estimate": ("estimate",),
    "method": ("METHODS",),
    "explain": ("Comparison", "Explanation", "compare", "explain", "open"),
    "mediation": ("Effects", "effects"),
    "benchmark": ("Benchmark", "benchmark"),
    "census": ("Census", "census"),
    "circuit": ("Task", "circuit"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
_MODULES = ("anatomy", "approximation", "attention", "captum", "check", "composite", "data", "intervene", "mediation",
            "nn", "ops", "quantus", "view", "zoo")

__all__ = [
    "METHODS", "Address", "Answer", "Benchmark", "Census", "Circuit", "Class", "Comparison", "Composite",
    "Contrast", "Curve", "Decomposition", "Division", "Effects", "End", "Explanation", "Function",
    "IndependentOutput", "Ledger", "LedgerError", "Prediction", "Probability", "Regression", "Relevance",
    "RelpropError", "Similarity", "Span", "Start", "Subject", "Tag", "Target", "Task", "Token", "UnruledOp",
    "anatomy", "approximation", "attention", "benchmark", "captum", "census", "check", "circuit", "compare",
    "composite", "data", "decompose", "effects", "estimate", "explain", "intervene", "load", "mediation", "nn",
    "open", "ops", "quantus", "view", "zoo",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"relprop has no {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(ModuleType):
    """This package. The import of a submodule sets its name here, where `load` and `explain` must stay functions."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
