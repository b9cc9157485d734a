"""Prompts with answers behind them: the sequences that the model runs, and the units of a map of both."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tokens import Layout, TextUnits

Said = list[int]  # the tokens of an answer


@dataclass(frozen=True, eq=False)
class Continued:
    """Prompts with S answers each, every one behind a copy of its prompt.

    `ids` and `mask` are of the sequences, (B S, T), padded on the right; `units` are of the rows, each prompt with all
    its answers; `layout` says how the rows lie in the sequences, None where each row is one.
    """

    ids: Tensor
    mask: Tensor
    units: TextUnits
    layout: Layout | None


def continued(ids: Tensor, units: TextUnits, answers: Sequence[Sequence[Said]], *, pad: int,
              spelled: Sequence[Sequence[list[str]]], padding: str) -> Continued:
    """The prompts of these rows with answers behind them.

    Args: ids: of the prompts, (B, T), with padding anywhere. answers: of each row S lists of tokens, which may be
        empty; spelled: the same as the tokenizer spells them. pad, padding: what fills short rows, and its spelling.
    """
    own = [[t for t, gone in enumerate(line) if not gone] for line in units.padding]
    prompts = [line[at].tolist() for line, at in zip(ids.cpu(), own)]
    count = len(answers[0])
    width = max(len(at) + max(map(len, said)) for at, said in zip(own, answers))
    sequences = [prompt + said for prompt, each in zip(prompts, answers) for said in each]
    filled = torch.tensor([line + [pad] * (width - len(line)) for line in sequences])
    mask = torch.tensor([[1] * len(line) + [0] * (width - len(line)) for line in sequences])
    alone = [(row, [said]) for row, each in enumerate(spelled) for said in each]
    flat = _units(units, own, alone, width, padding)
    if count == 1:
        return Continued(filled, mask, flat, None)
    total = max(len(at) + sum(map(len, said)) for at, said in zip(own, answers))
    together = _units(units, own, list(enumerate(spelled)), total, padding)
    source = torch.full((len(own), count, width), -1)
    for row, (at, each) in enumerate(zip(own, answers)):
        behind = len(at)
        for number, said in enumerate(each):
            source[row, number, :len(at)] = torch.arange(len(at))
            source[row, number, len(at):len(at) + len(said)] = torch.arange(behind, behind + len(said))
            behind += len(said)
    return Continued(filled, mask, together, Layout(source, flat))


def repeated(units: TextUnits, count: int) -> Layout:
    """The layout of rows that run `count` times as they are, such as an encoder's text beside answers of a decoder."""
    many = [row for row in range(units.rows) for _ in range(count)]
    padding = torch.tensor(units.padding)
    source = torch.arange(padding.shape[1]).masked_fill(padding, -1)
    return Layout(source[:, None].repeat(1, count, 1), units.take(many))


def _units(units: TextUnits, own: list[list[int]], rows: list[tuple[int, Sequence[list[str]]]], width: int,
           padding: str) -> TextUnits:
    """Units of these rows, each prompt with answers behind it, up to `width` tokens."""
    columns: dict[str, list] = {name: [] for name in ("tokens", "word_ids", "offsets", "special", "padding", "answers")}
    fills = {"tokens": padding, "word_ids": None, "offsets": (0, 0), "special": True, "padding": True, "answers": False}
    for row, answers in rows:
        said = [token for answer in answers for token in answer]
        for name, column in columns.items():
            before = [] if name == "answers" else [getattr(units, name)[row][t] for t in own[row]]
            if name == "answers":
                before = [False] * len(own[row]) if units.answers is None else [units.answers[row][t] for t in own[row]]
            more = {"tokens": said, "special": [True] * len(said), "padding": [False] * len(said),
                    "answers": [True] * len(said)}.get(name, [fills[name]] * len(said))
            line = [*before, *more]
            column.append(line + [fills[name]] * (width - len(line)))
    which = [row for row, _ in rows]
    kept = units.take(which)
    return TextUnits(**columns, words=kept.words, texts=kept.texts, seconds=kept.seconds)


def continuing(text: object, tokenizer: object) -> list[int]:
    """The tokens of a text that continues another one, without special tokens; ids as they are.

    Raises: ValueError for a text that has no token.
    """
    if not isinstance(text, str):
        return list(text)
    found = tokenizer.encode(text, add_special_tokens=False)
    if text.startswith(" "):  # SentencePiece puts the leading space itself, so that one given to it is a second one
        bare = tokenizer.encode(text.lstrip(" "), add_special_tokens=False)
        found = bare if bare and tokenizer.convert_ids_to_tokens(bare)[0].startswith("\u2581") else found
    if not found:
        raise ValueError(f"the tokenizer finds no token in {text!r}")
    return found
