"""The options that several commands have."""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BUNDLED = {"image": "digits-vit", "text": "reviews-bert"}  # explained when no model is named
COMPARED = "the default method, rollout, integrated-gradients"

Input = Annotated[str, typer.Argument(help=(
    "An image file, a text, a file of texts (one a line), or - for texts from stdin."
))]  # fmt: skip
Model = Annotated[str | None, typer.Option("--model", "-m", metavar="NAME", help=(
    "A bundled name, a folder, a hub id, or timm/NAME. "
    f"[default: {BUNDLED['image']} for an image, {BUNDLED['text']} for texts]"
))]  # fmt: skip
Targets = Annotated[list[str] | None, typer.Option("--target", "-t", metavar="TARGET", help=(
    "A label, a class index, or a next token; once for all inputs, or once for each. Also A - B for a contrast, "
    "p:LABEL for a probability, tag:TAG@WORD, span:TEXT, start:TEXT, end:TEXT of an answer in the context, "
    "answer:TEXT as the model goes on (answer: alone, as it would itself), similarity:TEXT. [default: the prediction]"
))]  # fmt: skip
Pair = Annotated[str | None, typer.Option("--pair", metavar="TEXT", help=(
    "A second text, or a file with one a line: the context of a question, or what is compared (with -t similarity:)."
))]  # fmt: skip
Method = Annotated[str | None, typer.Option("--method", metavar="METHOD", help=(
    "How to explain; relprop models --methods lists them, and the default for images and for texts."
))]  # fmt: skip
Methods = Annotated[list[str] | None, typer.Option("--method", metavar="METHOD", help=(
    f"What to compare; once for each. [default: {COMPARED}]"
))]  # fmt: skip
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help=(
    "Save to this file; the suffix says how: .png, .svg, .pdf, .html, .json, .safetensors."
))]  # fmt: skip
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Device = Annotated[str | None, typer.Option("--device", metavar="NAME", help=(
    "cpu, cuda, cuda:1, mps. [default: where the model is]"
))]  # fmt: skip
Dtype = Annotated[str | None, typer.Option("--dtype", metavar="NAME", help=(
    "Of the model: float32, float64, bfloat16, float16. [default: its own]"
))]  # fmt: skip
BatchSize = Annotated[int | None, typer.Option("--batch-size", metavar="N", min=1, help=(
    "Inputs in one pass. [default: all]"
))]  # fmt: skip
AsEstimate = Annotated[bool, typer.Option("--estimate", help="Say how much memory it will take, and do not do it.")]
Checkpoint = Annotated[bool, typer.Option("--checkpoint", help=(
    "Run each layer again on the way back: less memory, more time."
))]  # fmt: skip
Positions = Annotated[str | None, typer.Option("--positions", metavar="HOW", help=(
    "apart: relevance of positions as a map of its own; added: to that of tokens or pixels."
))]  # fmt: skip
Steps = Annotated[int, typer.Option("--steps", metavar="N", min=1, help="In how many parts the input is removed.")]
Randoms = Annotated[int, typer.Option("--randoms", metavar="N", min=1, help="Random orders to compare with.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Of everything random.")]
