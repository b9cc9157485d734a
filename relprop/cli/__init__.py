"""The command `relprop`: the verbs of the package on an image file, a text, or a file of lines.

Torch and all that stands on it is imported by the commands, not here, so that `relprop --help` answers at once.
"""
from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import RelpropError
from .circuit import circuit
from .given import by_row, listed, loaded, own_device, read, subject_of, watched
from .mediation import mediate
from .model import filled, models
from .option import (
    COMPARED,
    AsEstimate,
    AsJson,
    BatchSize,
    Checkpoint,
    Device,
    Dtype,
    Input,
    Method,
    Methods,
    Model,
    Output,
    Pair,
    Positions,
    Randoms,
    Seed,
    Steps,
    Targets,
)  # fmt: skip

if TYPE_CHECKING:
    from ..explain import Explanation

BAD_INPUT = 2  # exit code
REVIEW = "A gripping, beautifully acted story, ruined by a dull and endless final hour."
_UsageError = typer.BadParameter.__base__  # typer hands out this subclass only


class _Verbs(TyperGroup):
    """The one place where an error of the user becomes one line and exit code 2."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _warn
                return super().invoke(ctx)
        except (RelpropError, ValueError, TypeError, OSError, ImportError, _UsageError) as error:
            if ctx.params["debug"] and not isinstance(error, _UsageError):
                raise
            typer.echo(f"relprop: error: {_line(_message(error))}", err=True)
            raise typer.Exit(BAD_INPUT) from error


def _message(error: Exception) -> str:
    if isinstance(error, _UsageError):
        return error.format_message()
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"  # without the number
    return str(error) or type(error).__name__


def _warn(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """A warning as one line; where in the code it arose is nothing for this reader."""
    if issubclass(category, UserWarning):
        typer.echo(f"relprop: warning: {_line(str(message))}", err=True)


def _line(text: str) -> str:
    return " ".join(text.split())


app = typer.Typer(cls=_Verbs, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def main() -> None:
    """Entry point of the command `relprop`."""
    app(prog_name="relprop")


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"relprop {version('relprop')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def verbs(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Explain transformers by relevance propagation: maps that add up to the output, checked by ablation."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command()
def explain(
    input: Input, model: Model = None, target: Targets = None, method: Method = None, output: Output = None,
    as_json: AsJson = False, device: Device = None, dtype: Dtype = None, batch_size: BatchSize = None,
    positions: Positions = None, pair: Pair = None, checkpoint: Checkpoint = False, estimate: AsEstimate = False,
) -> None:  # fmt: skip
    """Map an output onto words or pixels, with its ledger."""
    _saved_later(output)
    if estimate:
        typer.echo(_estimated(
            input, model, target, method, device, dtype, batch_size, positions, pair, checkpoint, as_json
        ))  # fmt: skip
        return
    result = _explained(input, model, target, method, device, dtype, batch_size, positions, pair, checkpoint)
    if positions is not None and result.positions is None:
        warnings.warn(f"there is no map of positions: {result.provenance['positions']}", stacklevel=1)
    if output is not None:
        result.save(output, positions=positions == "apart" and result.positions is not None)
    typer.echo(result.to_json(full=False) if as_json else _report(result))


@app.command()
def check(
    input: Input, model: Model = None, target: Targets = None, method: Method = None, output: Output = None,
    as_json: AsJson = False, device: Device = None, dtype: Dtype = None, batch_size: BatchSize = None,
    steps: Steps = 10, randoms: Randoms = 20, seed: Seed = 0, pair: Pair = None,
) -> None:  # fmt: skip
    """Ablate what a map calls relevant; better than chance?"""
    _saved_later(output)
    result = _explained(input, model, target, method, device, dtype, batch_size, pair=pair)
    curve = result.check(
        steps=steps, randoms=randoms, seed=seed, batch_size=batch_size or 32, show_progress=watched()
    )  # fmt: skip
    if output is not None:
        result.save(output)
    typer.echo(json.dumps(curve.to_dict()) if as_json else curve.summary())


@app.command()
def compare(
    input: Input, model: Model = None, target: Targets = None, method: Methods = None, output: Output = None,
    as_json: AsJson = False, device: Device = None, dtype: Dtype = None, batch_size: BatchSize = None,
    pair: Pair = None,
) -> None:  # fmt: skip
    """Explain by several methods; rank them by ablation."""
    _saved_later(output)
    subject, inputs = loaded(input, model, device, dtype, pair)
    inputs, targets = by_row(inputs, target, subject)
    from ..explain import compare as run

    result = run(subject, inputs, targets, methods=method or None, batch_size=batch_size, show_progress=watched())
    if output is not None:
        result.save(output)
    table = result.table().to_string(float_format="{:.3g}".format, na_rep="-")
    typer.echo(json.dumps(result.to_dict()) if as_json else table)


@app.command()
def benchmark(
    model: Annotated[str, typer.Option("--model", "-m", metavar="NAME", help=(
        "A bundled name, a folder, a hub id, or timm/NAME."
    ))],
    data: Annotated[str, typer.Option("--data", "-d", metavar="DATA", help=(
        "digits, palindromes, brackets, sorted-lists; NAME:PATH, where NAME is mnist, movies, eraser, sst, pictures, "
        "segmentation, imagefolder, texts, textfolder, passages or squad; a folder of pictures with masks; or a .jsonl "
        "of texts."
    ))],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help=(
        "Where everything is written, and a run that was stopped goes on."
    ))],
    methods: Annotated[list[str] | None, typer.Option("--methods", metavar="METHOD", help=(
        "What to compare, with commas or once for each; all are tested against the first. "
        f"[default: {COMPARED}]"
    ))] = None,
    metrics: Annotated[list[str] | None, typer.Option("--metrics", metavar="METRIC", help=(
        "What to measure, with commas or once for each. [default: all that apply and are not costly]"
    ))] = None,
    count: Annotated[int, typer.Option("--count", metavar="N", min=1, help="Examples, at most.")] = 500,
    every: Annotated[bool, typer.Option("--every", help="Also inputs that the model gets wrong.")] = False,
    baseline: Annotated[str | None, typer.Option("--baseline", metavar="NAME", help=(
        "What stands for what is removed: mask, unk, pad, delete or a token's id; median, mean, zero, blur. "
        "[default: the mask token, the median colour]"
    ))] = None,
    by: Annotated[str | None, typer.Option("--by", metavar="UNIT", help=(
        "token or word, what is removed of a text; patch, to measure pictures by patches."
    ))] = None,
    seed: Seed = 0, batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help=(
        "Inputs in one pass, and in one file."
    ))] = 32,
    ends: Annotated[int, typer.Option("--ends", metavar="N", min=0, help=(
        "Read perturbation curves at each of the first and last N units, besides tenths."
    ))] = 0,
    as_json: AsJson = False, device: Device = None, dtype: Dtype = None,
) -> None:  # fmt: skip
    """Measure methods on data: a table with intervals and controls.

    Under accelerate launch -m relprop benchmark ... several processes share the work; without GPUs add --multi_gpu.
    """
    subject = subject_of(model, device or own_device(), dtype)
    from ..benchmark import benchmark as run

    baseline = int(baseline) if baseline is not None and baseline.isdecimal() else baseline
    found = run(
        subject, data, methods=listed(methods) or None, metrics=listed(metrics), out=out, count=count,
        correct_only=not every, baseline=baseline, by=by, seed=seed, batch_size=batch_size, ends=ends,
        show_progress=watched(),
    )  # fmt: skip
    if os.environ.get("RANK", "0") == "0":
        table = f"{found.written().T.to_string()}\n\n{found.cost.to_string(float_format='{:.3g}'.format)}"
        typer.echo(found.to_json() if as_json else f"{table}\n\nAll of it: {out}/table.html .csv .json .svg, rows.csv")


app.command()(mediate)
app.command()(circuit)


app.command()(models)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="the folder for the pictures")] = Path("demo-output"),
    seed: Seed = 0,
) -> None:
    """Explain two digits and a review; find a bias in heads."""
    output.mkdir(parents=True, exist_ok=True)
    picture, labels = _canvas(seed)
    _show("digits-vit", picture, labels, output / "digits")
    _show("reviews-bert", REVIEW, ["NEGATIVE"], output / "review")
    _mediated(output / "heads", seed)
    said = ", ".join(f"{output}/{name}.png .html" for name in ("digits", "review", "heads"))
    typer.echo(f"The maps, as pictures and pages: {said}")


def _canvas(seed: int) -> tuple[Any, list[str]]:
    """A picture, uint8 (Y, X), with two handwritten digits that no model was trained on, and which they are."""
    from ..zoo.digits import canvases

    drawn = canvases(1, seed=seed, digits=(2, 2))
    labels = [str(label) for label in drawn.labels[0].nonzero().flatten().tolist()]
    return (drawn.images[0, 0] * 255).round().byte().numpy(), labels


def _show(model: str, input: Any, targets: list[str], output: Path) -> None:
    """One input explained for each target, beside rollout, all of it checked; the report, and the maps in two files."""
    subject, found = subject_of(model), []
    from .. import view
    from ..explain import explain as run

    for method, wanted in [(None, targets), ("rollout", targets[:1])]:
        result = run(subject, [input] * len(wanted), wanted, method=method)
        result = replace(result, curve=result.check(show_progress=watched()))
        typer.echo(f"{_report(result)}\n  {result.curve.summary()}\n")
        found += [result.row(row) for row in range(result.rows)]
    for suffix in (".png", ".html"):
        view.save(found, output.with_suffix(suffix))


def _mediated(output: Path, seed: int) -> None:
    """Which heads of the bundled language model carry the bias that was planted in it; the summary, and two files."""
    subject = subject_of("tasks-gpt2")
    from .. import data
    from ..mediation import effects

    pairs = data.pairs("gender-bias", count=24, seed=seed)
    found = effects(subject, pairs, kind=["total", "direct", "indirect"], show_progress=watched(), seed=seed)
    one = pairs.pairs[0]
    a, b = one.continuations
    typer.echo(f"heads of {subject.name} that carry its planted bias: {one.base!r} becomes {one.counterfactual!r}, "
               f"which makes a, {a!r}, likely against b, {b!r} ...\n{found.summary()}\n")
    for suffix in (".png", ".html"):
        found.save(output.with_suffix(suffix))


def _explained(
    input: str, model: str | None, target: list[str] | None, method: str | None,
    device: str | None, dtype: str | None, batch_size: int | None, positions: str | None = None,
    pair: str | None = None, checkpoint: bool = False,
) -> Explanation:  # fmt: skip
    """What `explain` and `check` have in common."""
    subject, inputs = loaded(input, model, device, dtype, pair)
    inputs, targets = by_row(inputs, target, subject)
    from ..explain import explain as run  # after the input was read, since it waits for torch

    return run(
        subject, inputs, targets, method=method, positions=positions, batch_size=batch_size, checkpoint=checkpoint,
        show_progress=watched(),
    )  # fmt: skip


def _estimated(
    input: str, model: str | None, target: list[str] | None, method: str | None, device: str | None,
    dtype: str | None, batch_size: int | None, positions: str | None, pair: str | None, checkpoint: bool,
    as_json: bool,
) -> str:  # fmt: skip
    """What an explanation will take, in words or as JSON."""
    subject, inputs = loaded(input, model, device, dtype, pair)
    inputs, targets = by_row(inputs, target, subject)
    from ..estimate import estimate as run

    found = run(
        subject, inputs, targets, method=method, positions=positions, batch_size=batch_size, checkpoint=checkpoint
    )  # fmt: skip
    return json.dumps(found.to_dict()) if as_json else str(found)


def _saved_later(output: Path | None) -> None:
    """Raises what saving to `output` would, before anything has been computed for it."""
    if output is not None:
        from ..view.save import checked

        checked(output)


def _report(result: Explanation) -> str:
    """Each row of a result: what was explained, its words or strongest patches, its ledger."""
    from ..result.number import amount, percent

    said = []
    for row, (target, value) in enumerate(zip(result.target, result.value.tolist(), strict=True)):
        said.append(f"row {row}: target {target}, value {amount(value)}, by {result.method} ({result.conservation})")
        units = "  ".join(f"{unit} {relevance:+.3g}" for unit, relevance in _units(result, row))
        said.append(filled(units, "  "))
        if result.ledger is not None:
            books = result.ledger.table(row)
            said += [f"  {name:<24} {amount(part):>12} {percent(share):>10}" for name, part, share in books]
    return "\n".join(said)


def _units(result: Explanation, row: int) -> list[tuple[Any, float]]:
    """All words, special tokens and what was said, or the five strongest places."""
    from ..tokens import TextUnits

    if not isinstance(result.units, TextUnits):
        return result.top(5, row)
    special = [(token, relevance) for token, relevance in result.specials(row) if relevance]  # padding has none
    return [*result.words(row), *special, *result.answered(row)]


__all__ = ["BAD_INPUT", "app", "main", "read"]
