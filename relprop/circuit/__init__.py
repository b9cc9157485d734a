"""Circuits: which parts of a model, and which connections between them, do a task.

    >>> import torch, transformers
    >>> from relprop.circuit import Task, circuit
    >>> config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=9, n_positions=8)
    >>> model = transformers.GPT2LMHeadModel(config).eval()
    >>> task = Task("words", torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]]), metric=5)
    >>> found = circuit(model, task, method="random")
    >>> len(found), len(found.top(2))
    (4, 2)

A method is asked for scores, which say what to keep; whether what is kept does the task is another question, which is
asked of the model itself: see `relprop.circuit.evaluation`.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn

from .. import shard
from ..data import Pairs
from ..errors import Undefined
from ..numerics import tolerance
from ..result import Circuit
from ..still import settled
from ..subject import Subject
from .task import ABLATIONS, AT, LEVELS, METRICS, Prepared, Task, check_ablation, posed

NODES = (*LEVELS, *(f"{level}{AT}" for level in LEVELS))
"""Levels whose items are nodes."""
BOTH = (*NODES, "edges")


@dataclass(frozen=True)
class Method:
    """A way to score: `home` is the module of this folder and the function in it, imported when it is asked for.

    The function takes a `Prepared` task and, by keyword, `level` and `ablation`, besides `seed`, `batch_size` and
    `show_progress` if it has them, and options of its own; it returns a `Circuit` with a score for every item.
    `measures`: it runs both inputs anyway, and gives the metric's means as "clean" and "corrupted" in `about`.
    """

    home: str
    levels: tuple[str, ...] = NODES
    ablations: tuple[str, ...] = ABLATIONS
    measures: bool = False

    def run(self) -> Callable[..., Circuit]:
        module, _, name = self.home.partition(":")
        return getattr(import_module(f"{__name__}.{module}"), name)


METHODS: dict[str, Method] = {
    "cdt": Method("contextual:cdt"),
    "random": Method("chance:random", BOTH),
    "exact": Method("exact:exact", BOTH),
    "acdc": Method("acdc:acdc", ("edges",)),
    "atp": Method("gradient:atp", measures=True),
    "eap": Method("gradient:eap", BOTH, measures=True),
    "eap-ig": Method("gradient:eap_ig", BOTH, measures=True),
    "clean-corrupted": Method("gradient:clean_corrupted", BOTH, measures=True),
    "relp": Method("gradient:relp", BOTH, measures=True),
    "gim": Method("gradient:gim", BOTH, measures=True),
    "peap": Method("position:peap", ("edges",), ("resample",), measures=True),
    "information-flow": Method("flow:information_flow", ("heads", "mlps", "heads and mlps", "edges")),
}
"""Every method by name."""


def circuit(subject: str | Subject | nn.Module | tuple, task: Task | Pairs | str | Prepared, method: str = "cdt", *,
            level: str | Sequence[str] | None = None, ablation: str = "resample",
            options: Mapping[str, Any] | None = None, batch_size: int | None = None, seed: int = 0,
            show_progress: bool = False) -> Circuit:
    """The score of every node or edge of a model on a task: a circuit of all, to be narrowed by `top` or `threshold`.

    Args:
        subject: what `relprop.load` takes, a `Subject`, or any `nn.Module`.
        task: clean and corrupted inputs with a metric; of `Pairs`, the base is clean; or a name, as `Task.named` takes.
        method: a name of `METHODS`.
        level: what is scored: "heads", "mlps", "heads and mlps", "neurons", each with " at positions" behind it or not
            (those that the task names, else each), "edges"; or a list of addresses and patterns; None: "heads", or what
            the method scores.
        ablation: what is put in the place of a clean value, of `ABLATIONS`.
        options: of the method, by name, such as {"steps": 5}.
        batch_size: rows run at once; None: as the method has room. seed: of what is drawn.
    Returns: a `Circuit` with all items; scores estimate the change of the metric, in its unit, where the clean value of
        the item is replaced, as a mean over the rows. `about` has the metric's mean on "clean" and "corrupted" inputs.
    Raises: ValueError for an unknown method, a level or an ablation that it or the model does not have, an unknown
        option, or inputs that are no pairs, as of `Task.prepared`; Undefined for a metric that is equal on both.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    row, run, given = _method(method, level, ablation, options or {})
    level = row.levels[0] if level is None else level
    prepared = posed(subject, task, seed=seed)
    if not row.measures:
        changes(prepared)
    known = signature(run).parameters
    shared = {"seed": seed, "batch_size": batch_size, "show_progress": show_progress}
    began = time.perf_counter()
    try:
        with settled(prepared.model):
            found = run(prepared, level=level, ablation=ablation, **given,
                        **{name: value for name, value in shared.items() if name in known})
    except ValueError:
        changes(prepared)  # says so where the metric itself is no number
        raise
    if row.measures and _tiny(found.total or 0.0, [found.about.get("clean", 0.0)], prepared):
        changes(prepared)
    about = {"ablation": ablation, "options": dict(given), "seed": seed, "seconds": time.perf_counter() - began,
             **provenance(prepared), **found.about}
    if "clean" not in about:
        about |= {name: float(one.mean()) for name, one in zip(("clean", "corrupted"), prepared.measured)}
    return replace(found, method=method, about=about)


def changes(prepared: Prepared) -> tuple[Tensor, Tensor]:
    """The metric of the clean and of the corrupted inputs, (B,) each.

    Raises: Undefined where it is equal on both in each row, so that nothing could have an effect.
    """
    clean, corrupted = prepared.measured
    if _tiny(float((clean - corrupted).abs().max()), [*clean.tolist(), *corrupted.tolist()], prepared):
        raise Undefined(f"{prepared.outcome.name(prepared.subject)} is {float(clean.mean()):.4g} on the clean inputs "
                        f"of task {prepared.task.name!r} and the same on the corrupted ones, so that nothing can have "
                        "an effect on it; corrupt what the answer depends on, or take another metric")
    return clean, corrupted


def _tiny(difference: float, values: Sequence[float], prepared: Prepared) -> bool:
    """Whether values that differ by this are the same but for rounding."""
    return not abs(difference) > 1e-3 * tolerance(prepared.subject.dtype) * max(map(abs, values))


def provenance(prepared: Prepared) -> dict[str, Any]:
    """What a circuit's numbers depend on, beside its method: task, metric, model and version."""
    subject = prepared.subject
    return {"task": {"name": prepared.task.name, "rows": prepared.rows, **prepared.task.about},
            "metric": prepared.outcome.name(subject), "model": subject.name,
            "weights": shard.fingerprint(subject.model), "dtype": str(subject.dtype).removeprefix("torch."),
            "relprop": version("relprop")}


def _method(name: str, level: str | Sequence[str] | None, ablation: str, options: Mapping[str, Any]
            ) -> tuple[Method, Callable[..., Circuit], dict[str, Any]]:
    """The method by name, and its options, checked before anything is run."""
    if name not in METHODS:
        raise ValueError(f"no method {name!r} of circuits; there are {', '.join(METHODS)}")
    row = METHODS[name]
    if isinstance(level, str) and level not in row.levels:
        raise ValueError(f"{name} has no level {level!r}; it has {', '.join(row.levels)}")
    check_ablation(ablation, row.ablations)
    run = row.run()
    own = [one.name for one in signature(run).parameters.values() if one.kind is Parameter.KEYWORD_ONLY
           and one.name not in ("level", "ablation", "seed", "batch_size", "show_progress")]
    unknown = [option for option in options if option not in own]
    if unknown:
        raise ValueError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(own) or 'none'}")
    return row, run, dict(options)


__all__ = ["ABLATIONS", "LEVELS", "METHODS", "METRICS", "NODES", "Circuit", "Method", "Prepared", "Task", "changes",
           "circuit", "provenance"]
