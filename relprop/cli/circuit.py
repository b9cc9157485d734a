"""The verb `circuit`: which parts of a model, and which connections between them, do a task."""
from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .given import listed, own_device, saved_later, subject_of, watched
from .mediation import OWN
from .option import BUNDLED, AsJson, BatchSize, Device, Dtype, Seed

if TYPE_CHECKING:
    from ..circuit import Task
    from ..subject import Subject

WRITTEN = ("html", "png", "svg", "json", "csv", "graphml", "dot")
"""What is written of a circuit into a folder."""
PICTURES = "digits-"

Model = Annotated[str | None, typer.Option("--model", "-m", metavar="NAME", help=(
    f"A bundled name, a folder, or a hub id. [default: {BUNDLED['image']} for digits, else {OWN}]"
))]  # fmt: skip
Asked = Annotated[str, typer.Option("--task", "-t", metavar="TASK", help=(
    "indirect-objects, year-spans, planted-professions, gender-bias, for tasks-gpt2; ioi, greater-than, docstring, "
    "pronouns, induction, for any tokenizer; digits-swap, digits-mask, digits-blur; prompts:FILE of clean and corrupt "
    "texts with answers."
))]  # fmt: skip
Method = Annotated[str, typer.Option("--method", metavar="METHOD", help=(
    "cdt, relp, gim, atp, eap, eap-ig, clean-corrupted, peap, exact, acdc, information-flow, random."
))]  # fmt: skip
Level = Annotated[str | None, typer.Option("--level", metavar="LEVEL", help=(
    "heads, mlps, heads and mlps, neurons, each with ' at positions' or without; edges; or places as of relprop "
    "mediate --at, with commas. [default: heads, or what the method has]"
))]  # fmt: skip
Ablation = Annotated[str, typer.Option("--ablation", metavar="HOW", help=(
    "What stands for a clean value: resample, mean, mean by position, zero."
))]  # fmt: skip
Metric = Annotated[str | None, typer.Option("--metric", metavar="NAME", help=(
    "logit difference, probability difference, smallest logit difference, KL. [default: what suits the task]"
))]  # fmt: skip
Size = Annotated[int | None, typer.Option("--size", metavar="N", min=1, help="Keep so many of the ranking.")]
Reach = Annotated[float, typer.Option("--reach", metavar="SHARE", help=(
    "Without --size, and of methods that do not choose, keep as few of the ranking as are this faithful."
))]  # fmt: skip
Signed = Annotated[bool, typer.Option("--signed", help=(
    "Rank by what adds to the task, and what works against it last; else by size."
))]  # fmt: skip
Count = Annotated[int, typer.Option("--count", metavar="N", min=1, help="Inputs, at most.")]
Randoms = Annotated[int, typer.Option("--randoms", metavar="N", min=0, help="Random circuits to hold it against.")]
Tests = Annotated[bool, typer.Option("--tests", help="The hypothesis tests of Shi et al. 2024, too.")]
Options = Annotated[list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help=(
    "Of the method, such as steps=5 or tau=0.05; once for each."
))]  # fmt: skip
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help=(
    "Save to this file: .html, .png, .svg, .pdf, .json, .csv, .graphml, .dot. Or a folder, for "
    f"{', '.join(f'circuit.{suffix}' for suffix in WRITTEN)}"
))]  # fmt: skip


def circuit(
    task: Asked = "indirect-objects", model: Model = None, method: Method = "cdt", level: Level = None,
    ablation: Ablation = "resample", metric: Metric = None, size: Size = None, reach: Reach = 0.95,
    signed: Signed = False, count: Count = 50, randoms: Randoms = 200, tests: Tests = False, option: Options = None,
    output: Output = None, as_json: AsJson = False, device: Device = None, dtype: Dtype = None,
    batch_size: BatchSize = None, seed: Seed = 0,
) -> None:  # fmt: skip
    """Find the circuit of a task, and put it to the test.

    Examples: relprop circuit --task indirect-objects -o circuit/;
    relprop circuit -m gpt2 --task ioi --method relp --level edges.
    """
    target, options = _saved_later(output), _options(option)
    default = BUNDLED["image"] if task.startswith(PICTURES) else OWN
    subject = subject_of(default if model is None else model, device or own_device(), dtype)
    from ..circuit.study import study

    found = study(subject, _task(subject, task, count, seed, metric), method, level=_level(level), ablation=ablation,
                  options=options, size=size, reach=reach, absolute=not signed, randoms=randoms, tests=tests,
                  batch_size=batch_size, seed=seed, show_progress=watched())
    for path in target:
        found.save(path)
    said = "" if not target else f"\n\nSaved: {' '.join(map(str, target))}"
    typer.echo(json.dumps(found.to_dict(), allow_nan=False) if as_json else found.summary() + said)


def _task(subject: Subject, name: str, count: int, seed: int, metric: str | None) -> Task:
    from ..circuit import Task

    return Task.named(subject, name, count=count, seed=seed, metric=metric)


def _level(said: str | None) -> str | list[str] | None:
    """A level by its name, or addresses and patterns with commas."""
    if said is None or not said.startswith(("L", "embed", "logits")):
        return said
    return listed([said])


def _options(given: list[str] | None) -> dict[str, Any]:
    """Options of the method, their values as JSON where they are.

    Raises: ValueError for what is not NAME=VALUE.
    """
    found = {}
    for one in given or ():
        name, equals, value = one.partition("=")
        if not equals or not name:
            raise ValueError(f"--option is NAME=VALUE, such as steps=5, not {one!r}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def _saved_later(output: Path | None) -> list[Path]:
    if output is None:
        return []
    from ..circuit.study import checked

    return saved_later(output, "circuit", WRITTEN, checked)
