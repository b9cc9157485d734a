"""The verb `models`: what is bundled, and which architectures are explained."""
from __future__ import annotations

import json
import math
import re
import textwrap
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import search
from .option import AsJson

if TYPE_CHECKING:
    from ..result.census import Census

RECORD = files("relprop") / "census" / "record.json"
MARKS = {"+": "yes", "-": "NO", ".": ""}
SHOWN = 40  # architectures that are listed one by one

Pattern = Annotated[str | None, typer.Argument(metavar="[PATTERN]", help=(
    "Of architectures: a regular expression for library/task/family/class, such as llama or timm/.*swin."
))]  # fmt: skip


def models(
    pattern: Pattern = None,
    methods: Annotated[bool, typer.Option("--methods", help="List the methods instead.")] = False,
    census: Annotated[bool, typer.Option("--census", help=(
        "Build and run every architecture of the installed transformers and timm, or those of PATTERN, and see which "
        "are explained: about a second each."))] = False,
    every: Annotated[int, typer.Option("--every", metavar="N", min=1, help="Of these every so-manieth.")] = 1,
    processes: Annotated[int | None, typer.Option("--processes", metavar="N", min=1, help="How many at once.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help=(
        "Where a census writes entries as they come, and goes on when it was stopped."))] = None,
    output: Annotated[list[Path] | None, typer.Option("--output", "-o", metavar="FILE", help=(
        "Save a census to this file, once for each: .json, .md, .csv."))] = None,
    as_json: AsJson = False,
) -> None:
    """List the bundled models, and which architectures are explained."""
    if census:
        _census(pattern, every, processes, out, output or [], as_json)
    elif output or out or processes or every > 1:
        raise typer.BadParameter("--output, --out, --processes and --every are of --census")
    elif methods:
        rows = _method_rows()
        typer.echo(json.dumps(rows) if as_json else "\n".join(map(_method_line, rows)))
    elif pattern is not None:
        found = _matching(pattern)
        typer.echo(json.dumps(found) if as_json else _verdicts(found))
    else:
        rows = _model_rows()
        typer.echo(json.dumps(rows) if as_json else "\n".join([*map(_model_lines, rows), "", _recorded()]))


def _census(pattern: str | None, every: int, processes: int | None, out: Path | None, output: list[Path],
            as_json: bool) -> None:
    from ..census import census as run

    for path in output:
        if path.suffix not in (".json", ".md", ".csv"):
            raise typer.BadParameter(f"a census is written to .json, .md or .csv, not to {path.name}")
        if not path.parent.is_dir():
            raise typer.BadParameter(f"no folder {path.parent}; make it first")
    found: Census = run(pattern or "", every=every, processes=processes, out=out, show_progress=not as_json)
    for path in output:
        found.save(path)
    typer.echo(found.to_json() if as_json else f"{found.counts().to_string()}\n\n{found.summary()}")


def _record() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def _recorded() -> str:
    """The counts of the census that ships, by library and task."""
    record = _record()
    groups: dict[str, list[str]] = {}
    for key, verdict in record["architectures"].items():
        groups.setdefault("/".join(key.split("/")[:2]), []).append(_letters(verdict))
    names = record["questions"]
    ran = names.index("runs")
    head = ["", "asked", *names[1:]]
    rows = [[group, len(some), *(sum(one[ran] == one[at] == "+" for one in some) for at in range(1, len(names)))]
            for group, some in groups.items()]
    made = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [f"Architectures, by a census of {made}{_differs(record['versions'])}", _aligned([head, *rows])]
    return "\n".join([*lines, "relprop models PATTERN lists them; relprop models --census makes the census anew."])


def _differs(versions: dict[str, str]) -> str:
    """What is installed, where that is another version."""
    from importlib.metadata import version

    others = [f"{name} {version(name)}" for name, known in versions.items() if version(name) != known]
    return f" (installed: {', '.join(others)})" if others else ""


def _matching(pattern: str) -> dict[str, Any]:
    """The verdicts of the architectures of a pattern."""
    record = _record()
    kept = search.found(record["architectures"], pattern, what="architecture of the census")
    return {**record, "architectures": {key: record["architectures"][key] for key in kept}}


def _verdicts(found: dict[str, Any]) -> str:
    some = found["architectures"]
    rows = [[key, *(MARKS[letter] for letter in _letters(verdict))] for key, verdict in some.items()]
    why = [f"{key}: {verdict[1]}" for key, verdict in some.items() if isinstance(verdict, list)]
    more = [f"and {len(rows) - SHOWN} more; --json has all"] if len(rows) > SHOWN else []
    return "\n".join([_aligned([["", *found["questions"]], *rows[:SHOWN]]), *more, *why[:SHOWN]])


def _letters(verdict: str | list[str]) -> str:
    return verdict if isinstance(verdict, str) else verdict[0]


def _aligned(rows: list[list[Any]]) -> str:
    widths = [max(len(str(row[at])) for row in rows) for at in range(len(rows[0]))]
    first = lambda row: f"{row[0]:<{widths[0]}}"
    return "\n".join("  ".join([first(row), *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))]).rstrip()
                     for row in rows)


def _model_rows() -> list[dict[str, Any]]:
    """The bundled models: what their configs, weights and cards say."""
    from .. import zoo

    return [_card(name, zoo.path(name), zoo.config(name)) for name in zoo.names()]


def _card(name: str, folder: Path, config: dict) -> dict[str, Any]:
    labels = config.get("labels") or list(config.get("id2label", {}).values())
    weights, card = folder / "model.safetensors", (folder / "README.md").read_text(encoding="utf-8")
    return {
        "name": name,
        "modality": "image" if "input_size" in config else "text",
        "architecture": config.get("architecture") or config["architectures"][0],
        "parameters": _parameters(weights),
        "bytes": weights.stat().st_size,
        "labels": labels,
        "about": _found(r"^# [^\n]*\n+(.*?)\n\n", card),
        "accuracy": _found(r"^- \*\*Accuracy\*\* (.*?)(?=\n- |\Z)", card),
    }


def _model_lines(row: dict[str, Any]) -> str:
    size = f"{row['parameters'] / 1e6:.1f} M parameters, {row['bytes'] / 1e6:.1f} MB"
    says = f"labels {', '.join(row['labels'])}" if row["labels"] else "predicts the next token"
    head = f"{row['name']:<14} {row['modality']}: {row['architecture']}, {size}; {says}"
    rest = [row["about"], f"Accuracy {row['accuracy']}" if row["accuracy"] else ""]
    return "\n".join([head, *(filled(text, "    ") for text in rest if text)])


def _method_line(row: dict[str, str]) -> str:
    return f"{row['name']:<26} {row['conserves']}{row['default'] and '; the default for ' + row['default']}"


def _parameters(weights: Path) -> int:
    """Numbers in a safetensors file, by its header alone: eight bytes of length, then JSON."""
    with weights.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _found(pattern: str, card: str) -> str:
    """The first group where a model card matches, on one line."""
    match = re.search(pattern, card, flags=re.MULTILINE | re.DOTALL)
    return " ".join(match[1].split()) if match else ""


def _method_rows() -> list[dict[str, str]]:
    """The methods and what each conserves."""
    from .. import composite
    from ..method import METHODS

    known = {name: composite.get(name).conservation for name in composite.NAMES}
    default = {name: " and ".join(f"{kind}s" for kind, one in composite.DEFAULTS.items() if one == name)
               for name in METHODS}
    return [{"name": name, "conserves": known.get(name, composite.NOT), "default": default[name]} for name in METHODS]


def filled(text: str, indent: str) -> str:
    return textwrap.fill(text, 100, initial_indent=indent, subsequent_indent=indent)
