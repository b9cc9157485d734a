"""The verb `mediate`: which parts of a model carry the effect of a change of its input."""
from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .given import listed, own_device, saved_later, subject_of, target_of, watched
from .option import BUNDLED, AsJson, BatchSize, Device, Dtype, Seed

if TYPE_CHECKING:
    from ..data import Matched, Pairs
    from ..subject import Subject

KINDS, CONTROLLED = ("total", "direct", "indirect"), "controlled"
WRITTEN = ("html", "png", "svg", "json", "csv")
"""What is written of effects into a folder."""
OWN = "tasks-gpt2"  # runs on data that is made for it where no other model is named
TRACED = "L*@*"  # what is restored under noise

Model = Annotated[str | None, typer.Option("--model", "-m", metavar="NAME", help=(
    "A bundled name, a folder, a hub id, or timm/NAME. "
    f"[default: {BUNDLED['image']} for images, {BUNDLED['text']} for texts, {OWN} for data made for it]"
))]  # fmt: skip
Data = Annotated[str | None, typer.Option("--data", "-d", metavar="PAIRS", help=(
    "professions:PATH, winobias:PATH, winogender:PATH, crows:PATH; digits-swap, digits-mask, digits-blur; gender-bias, "
    "planted-professions, indirect-objects, year-spans, for tasks-gpt2; ioi, greater-than, docstring, pronouns, "
    "induction, for any tokenizer; or a .jsonl of pairs with base, counterfactual and continuations."
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
    "Of total, direct, indirect and controlled, with commas or once for each. [default: all, controlled with --fixed]"
))]  # fmt: skip
Scale = Annotated[str, typer.Option("--scale", metavar="SCALE", help="difference, or ratio: y / y(base) - 1.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help=(
    "Save to this file: .png, .svg, .pdf, .html, .json, .safetensors, .csv. Or a folder, for "
    f"{', '.join(f'effects.{suffix}' for suffix in WRITTEN)}; with --subset subset.html ..."
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
    "relprop mediate ... several processes share it; without GPUs add --multi_gpu."
))]  # fmt: skip
Few = Annotated[int | None, typer.Option("--subset", metavar="K", min=1, help=(
    "Choose few mediators, at most K, that do together what all do: one after the other, each time the one that adds "
    "most."
))]  # fmt: skip
EachLayer = Annotated[bool, typer.Option("--each-layer", help="With --subset: within each layer, too.")]
Corrupt = Annotated[str | None, typer.Option("--noise", metavar="WHERE", help=(
    "Causal tracing, without a counterfactual: noise on these positions of the embedded base, and each place restored "
    "alone. Words of the text, a span of the data such as profession, or positions, 2 or 1-3. [default of --at: L*@*]"
))]  # fmt: skip
Window = Annotated[int | None, typer.Option("--window", metavar="N", min=1, help=(
    "With --noise: restore so many layers together. [default: 1]"
))]  # fmt: skip
Fixed = Annotated[str | None, typer.Option("--fixed", metavar="VALUE", help=(
    "Of controlled effects, what each mediator is held at on both sides: zero, mean (over the bases), or a number."
))]  # fmt: skip
Align = Annotated[str | None, typer.Option("--align", metavar="HOW", help=(
    "slots: of pairs whose sides differ in their number of tokens, all outside of the named parts (of texts, of the "
    "words that differ, @changed) stands for itself, and the last token of a part for its last. [default: such pairs "
    "are left out]"
))]  # fmt: skip
Receiver = Annotated[list[str] | None, typer.Option("--receiver", metavar="PLACES", help=(
    "Only what passes from --at to these places, and from there on any way; outcome is the output itself. As --at."
))]  # fmt: skip
Held = Annotated[list[str] | None, typer.Option("--held", metavar="PLACES", help=(
    "With --receiver: what passes nothing on, as --at; none is every path. [default: L*.attn.H* and L*.mlp]"
))]  # fmt: skip
PromptOnly = Annotated[bool, typer.Option("--prompt-only", help=(
    "Change mediators at the prompt's positions alone, not at those of the continuation."
))]  # fmt: skip


def mediate(
    model: Model = None, data: Data = None, base: Base = None, counterfactual: Counterfactual = None,
    continuation: Continuations = None, outcome: Outcome = None, at: At = None, kind: Kind = None,
    scale: Scale = "difference", output: Output = None, count: Count = 100, prompt_only: PromptOnly = False,
    estimate: Estimate = None, verify: Verify = None, subset: Few = None, each_layer: EachLayer = False,
    noise: Corrupt = None, window: Window = None, receiver: Receiver = None, held: Held = None, align: Align = None,
    fixed: Fixed = None, resume: Resume = None,
    as_json: AsJson = False, device: Device = None, dtype: Dtype = None, batch_size: BatchSize = None, seed: Seed = 0,
) -> None:  # fmt: skip
    """Find the heads, neurons or layers that carry an effect.

    Examples: relprop mediate --data digits-swap
    --at 'L*.attn.H*' -o effects/; relprop mediate -m gpt2 --data
    professions:professions.json --outcome ratio --scale ratio;
    relprop mediate -m gpt2 --base "The Space Needle is in the
    city of" --continuation ' Seattle' --noise 'Space Needle'.
    """
    _check({"subset": subset, "each-layer": each_layer, "noise": noise, "window": window, "estimate": estimate,
            "verify": verify, "kind": kind, "resume": resume, "prompt-only": prompt_only, "receiver": receiver,
            "held": held, "align": align, "fixed": fixed, "counterfactual": counterfactual})
    target, kinds = _saved_later(output, "effects" if subset is None else "subset"), _kinds(kind, fixed)
    alone = noise is not None and data is None and base is not None
    load = lambda default: subject_of(default if model is None else model, device or own_device(), dtype)
    subject = load(OWN) if _of_tokens(data) else None
    given = _Clean(base, tuple(continuation or ())) if alone else \
        _Changed(_pairs(data, base, counterfactual, continuation, count, seed, subject), align)
    subject = subject or load(BUNDLED[given.modality])
    matched = given.matched(subject)
    shared = {"at": _places(at or [TRACED if noise else "L*.attn.H*"], matched), "scale": scale,
              "batch_size": batch_size, "show_progress": watched()}
    asked = _outcome(outcome, subject, matched)
    if noise is not None:
        found = _traced(subject, matched, asked, corrupt=noise, window=window or 1, seed=seed, **shared)
    elif subset is not None:
        found = _few(subject, matched, asked, each_layer, resume, k=subset, prompt_only=prompt_only, **shared)
    elif receiver is not None:
        found = _paths(subject, matched, asked, receiver, held, prompt_only=prompt_only, out=resume, seed=seed,
                       **shared)
    else:
        found = _effects(subject, matched, asked, kind=kinds, prompt_only=prompt_only, estimate=estimate,
                         verify=verify, out=resume, seed=seed, fixed=_fixed(fixed, matched), **shared)
    if os.environ.get("RANK", "0") != "0":
        return
    from ..mediation.given import named, told

    found = _with(found, lambda one: replace(one, outcome=named(one.outcome, given.words),
                                             about={**told(given.name, given.words), **one.about}))
    for path in target:
        found.save(path)
    said = "" if not target else f"\n\nSaved: {' '.join(map(str, target))}"
    typer.echo(json.dumps(found.to_dict(), allow_nan=False) if as_json else found.summary() + said)


NEEDS = {"each-layer": "subset", "window": "noise", "held": "receiver", "verify": "estimate"}
AGAINST = {"subset": ("estimate", "verify", "kind", "fixed"), "receiver": ("estimate", "verify", "kind", "fixed"),
           "noise": ("estimate", "verify", "kind", "fixed", "resume", "prompt-only", "counterfactual", "align")}


def _kinds(asked: Sequence[str] | None, fixed: str | None) -> list[str]:
    """The kinds of effect; controlled ones where there is something that mediators are held at.

    Raises: ValueError for kinds that there are not, and controlled effects without what they are held at.
    """
    kinds = listed(asked) or [*KINDS, *([CONTROLLED] if fixed is not None else [])]
    if not set(kinds) <= {*KINDS, CONTROLLED}:
        raise ValueError(f"kinds of effect are {', '.join([*KINDS, CONTROLLED])}, not {', '.join(kinds)}")
    if (CONTROLLED in kinds) != (fixed is not None):
        raise ValueError("controlled effects and --fixed go together: --kind controlled --fixed zero")
    return kinds


def _fixed(said: str | None, matched: Matched) -> Any:
    """What mediators are held at.

    Raises: ValueError for what is no number, or word for one.
    """
    from ..intervene import Given, Mean, Zero

    if said is None:
        return None
    if said in ("zero", "mean"):
        return Zero() if said == "zero" else Mean(matched.base)
    try:
        return Given(float(said))
    except ValueError as cause:
        raise ValueError(f"--fixed is zero, mean or a number, not {said!r}") from cause


def _check(given: dict[str, Any]) -> None:
    """Raises: ValueError for options that do not go together, and an alignment that there is not."""
    given = {name: value for name, value in given.items() if value not in (None, False, [])}
    for name, needed in NEEDS.items():
        if name in given and needed not in given:
            raise ValueError(f"--{name} goes with --{needed}; give it too")
    asked = [name for name in AGAINST if name in given]
    wrong = [other for one in asked for other in AGAINST[one] if other in given] + asked[1:]
    if wrong:
        raise ValueError(f"--{asked[0]} does not go with --{wrong[0]}; leave one of them out")
    if given.get("align", "slots") != "slots":
        raise ValueError(f"--align is slots, not {given['align']!r}; relprop.effects(align=...) takes positions, too")


def _effects(subject: Subject, matched: Matched, asked: Any, **options: Any) -> Any:
    """The effects of each mediator alone."""
    from ..mediation import effects

    return effects(subject, matched, None, asked, **options)


def _few(subject: Subject, matched: Matched, asked: Any, each_layer: bool, resume: Path | None, **options: Any) -> Any:
    """A subset of all, and with `each_layer` one of each layer beside it."""
    from ..mediation import Subsets, subset, subsets

    under = lambda name: None if resume is None else resume / name
    if not each_layer:
        return subset(subject, matched, None, asked, out=resume, **options)
    return Subsets({"": subset(subject, matched, None, asked, out=under("all"), **options),
                    **subsets(subject, matched, None, asked, out=under("layers"), **options)})


def _paths(subject: Subject, matched: Matched, asked: Any, receiver: Sequence[str], held: Sequence[str] | None, *,
           at: list[str], **options: Any) -> Any:
    """What passes from each place to each receiver."""
    from ..mediation import path_effects
    from ..mediation.path import END, HELD

    end = list(receiver) == [END]
    if END in receiver and not end:
        raise ValueError(f"--receiver {END} is for itself; ask for it by a command of its own")
    places = HELD if held is None else () if list(held) == ["none"] else _places(held, matched)
    return path_effects(subject, matched, None, asked, sender=at, receiver=None if end else _places(receiver, matched),
                        held=places, **options)


def _traced(subject: Subject, matched: Matched, asked: Any, **options: Any) -> Any:
    """What restoring each place gives back; of one next token its probability, as of the prediction."""
    from ..mediation import tracing
    from ..target import Probability, Token

    if isinstance(asked, list) and all(isinstance(one, Token) for one in asked):
        asked = [Probability(one) for one in asked]
    return tracing(subject, matched.base, asked, spans=matched.spans, **options)


def _with(found: Any, change: Callable[[Any], Any]) -> Any:
    """Effects or a subset changed; of several subsets each."""
    return type(found)({name: change(one) for name, one in found.items()}) if isinstance(found, dict) else change(found)


@dataclass(frozen=True)
class _Changed:
    """Pairs of inputs, which are aligned or not."""

    pairs: Pairs
    align: str | None = None

    @property
    def modality(self) -> str:
        return self.pairs.modality

    @property
    def name(self) -> str:
        return self.pairs.name

    @property
    def words(self) -> list[tuple[str, ...]]:
        """The continuations of each."""
        return [one.continuations for one in self.pairs.pairs]

    def matched(self, subject: Subject) -> Matched:
        return _matched(subject, self.pairs, self.align)


@dataclass(frozen=True)
class _Clean:
    """Texts without a counterfactual, each with the same continuations."""

    texts: Sequence[str]
    continuations: tuple[str, ...]
    modality: str = "text"
    name: str = "texts"

    @property
    def words(self) -> list[tuple[str, ...]]:
        """The continuations of each."""
        return [self.continuations] * len(self.texts)

    def matched(self, subject: Subject) -> Matched:
        """Both sides alike."""
        from ..data import Matched
        from ..target.continuation import continuing

        batch, of_tokens = subject.prepare(list(self.texts)), subject.targets(None, 1).vocabulary.of_tokens
        tokens = lambda one: continuing(one, subject.tokenizer) if of_tokens else one
        each = tuple([tokens(one)] * batch.rows for one in self.continuations)
        return Matched(batch, batch, None, each, {}, {})


def _saved_later(output: Path | None, name: str) -> list[Path]:
    if output is None:
        return []
    from ..mediation.finding import checked

    return saved_later(output, name, WRITTEN, checked)


def _of_tokens(data: str | None) -> bool:
    """Whether data is made for a language model: for the bundled one, or for any tokenizer."""
    from ..data import DRAWN, SPOKEN

    return data in SPOKEN or data in DRAWN and not data.startswith("digits")


def _pairs(data: str | None, base: Sequence[str] | None, counterfactual: Sequence[str] | None,
           continuations: Sequence[str] | None, count: int, seed: int, subject: Subject | None) -> Pairs:
    """The pairs of the data, or of the texts, with the continuations that were given."""
    from ..data import Pair, Pairs, pairs

    if (data is None) == (base is None) or (base is None) != (counterfactual is None):
        raise ValueError("give --data, or --base and --counterfactual")
    if data is not None:
        found = pairs(data, count=count, seed=seed, tokenizer=None if subject is None else subject.tokenizer)
        if not continuations:
            return found
        return replace(found, pairs=[replace(one, continuations=tuple(continuations)) for one in found.pairs])
    if len(base) != len(counterfactual):
        raise ValueError(f"{len(base)} --base and {len(counterfactual)} --counterfactual; give one for each")
    made = [Pair(one, other, tuple(continuations or ()), *_changed(one, other)) for one, other in
            zip(base, counterfactual)]
    return Pairs("texts", "text", made)


def _changed(base: str, other: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The words that differ, as spans of both sides."""
    from ..data import differing

    found = differing(base, other)
    return ({}, {}) if found is None else ({"changed": found[0]}, {"changed": found[1]})


def _matched(subject: Subject, pairs: Pairs, align: str | None) -> Matched:
    """The pairs as the model takes them; those whose sides differ in their number of tokens are left out, and told,
    unless they are aligned.

    Raises: ValueError if none is left, with the tokenisations of the first.
    """
    from ..data import matched
    from ..mediation.given import labelled

    if align is None and pairs.modality == subject.modality == "text" and subject.tokenizer is not None:
        size = lambda text: len(subject.tokenizer.encode(text))
        rows = [row for row, one in enumerate(pairs.pairs) if size(one.base) == size(one.counterfactual)]
        if not rows:
            sides = [subject.tokenizer.convert_ids_to_tokens(subject.tokenizer.encode(text))
                     for text in (pairs.pairs[0].base, pairs.pairs[0].counterfactual)]
            raise ValueError(f"no pair has as many tokens on both sides; the first has {len(sides[0])}, "
                             f"{' | '.join(sides[0])}, and {len(sides[1])}, {' | '.join(sides[1])}; change a word into "
                             "one of as many tokens, or give --align slots")
        if len(rows) < len(pairs):
            warnings.warn(f"{len(pairs) - len(rows)} of {len(pairs)} pairs are left out: their sides differ in their "
                          "number of tokens", stacklevel=1)
        pairs = pairs.take(rows)
    return labelled(subject, pairs, matched(subject, pairs, align=align))


def _outcome(asked: str | None, subject: Subject, pairs: Matched) -> Any:
    """What effects are effects on.

    Raises: ValueError for an outcome of two continuations where there are not two.
    """
    from ..mediation import KL, Difference, LogOdds, Ratio
    from ..mediation.given import standard

    two = {"log-odds": LogOdds, "ratio": Ratio, "difference": Difference}
    count = len(pairs.continuations)
    if asked == "kl":
        return KL()
    if asked is None and count <= 2:
        return standard(subject, pairs.continuations)
    if asked is not None and asked not in two:
        return target_of(asked, subject)
    if count != 2:
        raise ValueError(f"{asked or 'log-odds'} is of two continuations, and there are {count}; give --continuation "
                         "twice, or another --outcome")
    return two[asked](*pairs.continuations)


def _places(patterns: Sequence[str], pairs: Matched) -> list[str]:
    """The patterns, with `@*` as every position that all rows have."""
    from ..mediation.tracing import everywhere

    return everywhere(list(patterns), pairs.base)


__all__ = ["mediate"]
