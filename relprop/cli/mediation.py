"""The verb `mediate`: which parts of a model carry the effect of a change of its input."""
from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .given import listed, own_device, subject_of, target_of, watched
from .option import BUNDLED, AsJson, BatchSize, Device, Dtype, Seed

if TYPE_CHECKING:
    from ..data import Matched, Pairs
    from ..subject import Subject

KINDS = ("total", "direct", "indirect")
WRITTEN = ("html", "png", "svg", "json", "csv")
"""What is written of effects into a folder."""
EVERY = "@*"  # each position for itself
SHOWN = 4  # choices of two candidates that reports tell, at most

Model = Annotated[str | None, typer.Option("--model", "-m", metavar="NAME", help=(
    "A bundled name, a folder, a hub id, or timm/NAME. "
    f"[default: {BUNDLED['image']} for images, {BUNDLED['text']} for texts]"
))]  # fmt: skip
Data = Annotated[str | None, typer.Option("--data", "-d", metavar="PAIRS", help=(
    "professions:PATH, winobias:PATH, winogender:PATH, crows:PATH; digits-swap, digits-mask, digits-blur; or a .jsonl "
    "of pairs with base, counterfactual and continuations."
))]  # fmt: skip
Base = Annotated[list[str] | None, typer.Option("--base", metavar="TEXT", help=(
    "Instead of data: a text, once for each pair."
))]  # fmt: skip
Counterfactual = Annotated[list[str] | None, typer.Option("--counterfactual", metavar="TEXT", help=(
    "The same text with what is changed, once for each --base."
))]  # fmt: skip
Continuations = Annotated[list[str] | None, typer.Option("--continuation", metavar="TEXT", help=(
    "What may follow, twice; the first is what the change makes likely: --continuation ' he' --continuation ' she'. "
    "[default: those of the data]"
))]  # fmt: skip
Outcome = Annotated[str | None, typer.Option("--outcome", metavar="WHAT", help=(
    "Of two continuations log-odds, ratio or difference of their probabilities; kl, how far the whole output is from "
    "the base's; or a target: a label, a class index, a next token. [default: log-odds, without continuations the "
    "prediction]"
))]  # fmt: skip
At = Annotated[list[str] | None, typer.Option("--at", metavar="PLACES", help=(
    "Mediators, once for each pattern: L*.attn.H*, L*.mlp, L3.mlp.N*, L*.attn.H*.pattern, L*@-1, L*.mlp@profession; "
    "L*@* is each position for itself. [default: L*.attn.H*]"
))]  # fmt: skip
Kind = Annotated[list[str] | None, typer.Option("--kind", metavar="KIND", help=(
    "Of total, direct and indirect, with commas or once for each. [default: all three]"
))]  # fmt: skip
Scale = Annotated[str, typer.Option("--scale", metavar="SCALE", help="difference, or ratio: y / y(base) - 1.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help=(
    "Save to this file: .png, .svg, .pdf, .html, .json, .safetensors, .csv. Or a folder, for "
    f"{', '.join(f'effects.{suffix}' for suffix in WRITTEN)}."
))]  # fmt: skip
Count = Annotated[int, typer.Option("--count", metavar="N", min=1, help="Pairs of the data, at most.")]
Estimate = Annotated[str | None, typer.Option("--estimate", metavar="METHOD", help=(
    "Rank the mediators by a first-order estimate, attribution, relevance or integrated-gradients, and compute only "
    "the first exactly: for neurons."
))]  # fmt: skip
Verify = Annotated[int | None, typer.Option("--verify", metavar="K", min=1, help=(
    "How many of an estimate's first. [default: 20]"
))]  # fmt: skip
Resume = Annotated[Path | None, typer.Option("--resume", metavar="FOLDER", help=(
    "Write the sweep here as it goes; the same command goes on where one was stopped, and under accelerate launch -m "
    "relprop mediate ... several processes share it."
))]  # fmt: skip
PromptOnly = Annotated[bool, typer.Option("--prompt-only", help=(
    "Change mediators at the prompt's positions alone, not at those of the continuation."
))]  # fmt: skip


def mediate(
    model: Model = None, data: Data = None, base: Base = None, counterfactual: Counterfactual = None,
    continuation: Continuations = None, outcome: Outcome = None, at: At = None, kind: Kind = None,
    scale: Scale = "difference", output: Output = None, count: Count = 100, prompt_only: PromptOnly = False,
    estimate: Estimate = None, verify: Verify = None, resume: Resume = None,
    as_json: AsJson = False, device: Device = None, dtype: Dtype = None, batch_size: BatchSize = None, seed: Seed = 0,
) -> None:  # fmt: skip
    """Find the heads, neurons or layers that carry an effect.

    Examples: relprop mediate --data digits-swap
    --at 'L*.attn.H*' -o effects/; relprop mediate -m gpt2 --data
    professions:professions.json --outcome ratio --scale ratio.
    """
    target, kinds = _saved_later(output), listed(kind) or list(KINDS)
    if not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds of effect are {', '.join(KINDS)}, not {', '.join(kinds)}")
    pairs = _pairs(data, base, counterfactual, continuation, count, seed)
    subject = subject_of(BUNDLED[pairs.modality] if model is None else model, device or own_device(), dtype)
    from ..mediation import effects

    matched = _matched(subject, pairs)
    found = effects(
        subject, matched.base, matched.counterfactual, _outcome(outcome, subject, matched), spans=matched.spans,
        at=_places(at or ["L*.attn.H*"], matched), kind=kinds, scale=scale, prompt_only=prompt_only,
        estimate=estimate, verify=verify, out=resume, batch_size=batch_size, seed=seed, show_progress=watched(),
    )  # fmt: skip
    if os.environ.get("RANK", "0") != "0":
        return
    found = replace(found, outcome=_named(found.outcome, pairs), about={**_told(pairs), **found.about})
    for path in target:
        found.save(path)
    said = "" if not target else f"\n\nSaved: {' '.join(map(str, target))}"
    typer.echo(json.dumps(found.to_dict(), allow_nan=False) if as_json else found.summary() + said)


def _saved_later(output: Path | None) -> list[Path]:
    """The files that will be written; raises what that would, before anything has been computed."""
    if output is None:
        return []
    from ..mediation.finding import checked

    if output.suffix and not output.is_dir():
        return [checked(output)]
    output.mkdir(parents=True, exist_ok=True)
    return [output / f"effects.{suffix}" for suffix in WRITTEN]


def _pairs(data: str | None, base: Sequence[str] | None, counterfactual: Sequence[str] | None,
           continuations: Sequence[str] | None, count: int, seed: int) -> Pairs:
    """The pairs of the data, or of the texts, with the continuations that were given."""
    from ..data import Pair, Pairs, pairs

    if (data is None) == (base is None) or (base is None) != (counterfactual is None):
        raise ValueError("give --data, or --base and --counterfactual")
    if data is not None:
        found = pairs(data, count=count, seed=seed)
        if not continuations:
            return found
        return replace(found, pairs=[replace(one, continuations=tuple(continuations)) for one in found.pairs])
    if len(base) != len(counterfactual):
        raise ValueError(f"{len(base)} --base and {len(counterfactual)} --counterfactual; give one for each")
    made = [Pair(one, other, tuple(continuations or ())) for one, other in zip(base, counterfactual)]
    return Pairs("texts", "text", made)


def _matched(subject: Subject, pairs: Pairs) -> Matched:
    """The pairs as the model takes them; those whose sides differ in their number of tokens are left out, and told.

    Raises: ValueError if none is left, with the tokenisations of the first.
    """
    from ..data import matched

    if pairs.modality == subject.modality == "text" and subject.tokenizer is not None:
        size = lambda text: len(subject.tokenizer.encode(text))
        rows = [row for row, one in enumerate(pairs.pairs) if size(one.base) == size(one.counterfactual)]
        if not rows:
            sides = [subject.tokenizer.convert_ids_to_tokens(subject.tokenizer.encode(text))
                     for text in (pairs.pairs[0].base, pairs.pairs[0].counterfactual)]
            raise ValueError(f"no pair has as many tokens on both sides; the first has {len(sides[0])}, "
                             f"{' | '.join(sides[0])}, and {len(sides[1])}, {' | '.join(sides[1])}; change a word into "
                             "one of as many tokens")
        if len(rows) < len(pairs):
            warnings.warn(f"{len(pairs) - len(rows)} of {len(pairs)} pairs are left out: their sides differ in their "
                          "number of tokens", stacklevel=1)
        pairs = pairs.take(rows)
    found = matched(subject, pairs)
    if subject.targets(None, 1).vocabulary.of_tokens:
        return found
    return replace(found, continuations=tuple(map(list, zip(*(one.continuations for one in pairs.pairs)))))  # labels


def _outcome(asked: str | None, subject: Subject, pairs: Matched) -> Any:
    """What effects are effects on.

    Raises: ValueError for an outcome of two continuations where there are not two.
    """
    from ..mediation import KL, Difference, LogOdds, Ratio

    two = {"log-odds": LogOdds, "ratio": Ratio, "difference": Difference}
    count = len(pairs.continuations)
    if asked == "kl":
        return KL()
    if asked is None and count == 0:
        return None
    if asked is None and count == 1:
        return _single(pairs.continuations[0], subject)
    if asked is not None and asked not in two:
        return target_of(asked, subject)
    if count != 2:
        raise ValueError(f"{asked or 'log-odds'} is of two continuations, and there are {count}; give --continuation "
                         "twice, or another --outcome")
    return two[asked or "log-odds"](*pairs.continuations)


def _named(outcome: str, pairs: Pairs) -> str:
    """The outcome's name, its candidates by their words where all pairs have the same."""
    words = {one.continuations for one in pairs.pairs}
    first = next(iter(words)) if len(words) == 1 else ()
    for letter, word in zip("ab", first):
        outcome = outcome.replace(f"P({letter})", f"P({word!r})")
    return outcome


def _told(pairs: Pairs) -> dict[str, Any]:
    """What reports say of the pairs: their name, and what a and b are where they differ from pair to pair."""
    words = list(dict.fromkeys(one.continuations for one in pairs.pairs))
    differ = 1 < len(words) <= SHOWN and len(words[0]) == 2
    return {"data": pairs.name, **({"a, b": "; or ".join(f"{a!r}, {b!r}" for a, b in words)} if differ else {})}


def _single(each: Sequence[Any], subject: Subject) -> list[Any]:
    """One continuation a row as a target: a label, or a next token.

    Raises: ValueError for several tokens, with what they are.
    """
    from ..target import Token

    if not subject.targets(None, 1).vocabulary.of_tokens:
        return list(each)
    many = next((ids for ids in each if len(ids) != 1), None)
    if many is not None:
        raise ValueError(f"{subject.tokenizer.decode(many)!r} is {len(many)} tokens, "
                         f"{subject.tokenizer.convert_ids_to_tokens(many)}, where one is needed; give two "
                         "continuations, or one of one token")
    return [Token(ids[0]) for ids in each]


def _places(patterns: Sequence[str], pairs: Matched) -> list[str]:
    """The patterns, with `@*` as every position that all rows have."""
    from ..tokens import TextUnits

    units = pairs.base.units
    if not any(one.endswith(EVERY) for one in patterns):
        return list(patterns)
    if isinstance(units, TextUnits):
        names = [f"@{at}" for at in range(min(row.count(False) for row in units.padding))]
    elif units.grid is not None:
        names = ["@cls", *(f"@p{patch}" for patch in range(units.grid[0] * units.grid[1]))]
    else:
        raise ValueError(f"{EVERY} needs tokens or patches, and this model's input has neither")
    return [one.removesuffix(EVERY) + name for one in patterns for name in (names if one.endswith(EVERY) else [""])]


__all__ = ["mediate"]
