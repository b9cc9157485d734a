"""A JSON file of prompts in pairs, with what is right and what is wrong behind the clean one."""
from __future__ import annotations

import gzip
import json
from pathlib import Path

from .example import chosen
from .pair import Pair, Pairs

SUFFIXES = (".json", ".json.gz")


def prompts(path: str | Path, count: int | None = None, *, seed: int = 0) -> Pairs:
    """Pairs of clean and corrupted prompts.

    The file is {"prompts": [{"clean": ..., "corrupt": ..., "answers": [...], "wrong_answers": [...]}, ...],
    "word_idxs": {name: position}}, prompts being texts or lists of token ids; names of positions may be left out, and
    become spans of tasks. This is how auto-circuit (Miller et al. 2024) keeps its data.

    Args: path: .json or .json.gz. count: how many, drawn by the seed; None: all.
    Raises: ValueError for a file that is none of these, with the prompt, and for answers at several positions.
    """
    path = Path(path)
    opened = gzip.open if path.name.endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            read = json.load(file)
        listed = read["prompts"]
    except (json.JSONDecodeError, KeyError, TypeError) as cause:
        raise ValueError(f'{path.name} holds no prompts: expected {{"prompts": [{{"clean": ..., "corrupt": ...}}]}} '
                         f"({type(cause).__name__}: {cause})") from cause
    pairs = [_pair(number, one, path.name) for number, one in chosen(list(enumerate(listed)), count, seed)]
    about = {"count": count, "seed": seed}
    named = read.get("word_idxs") or {}
    if named:
        about["positions"] = {_name(name): int(at) for name, at in named.items()}
    modality = "text" if pairs and isinstance(pairs[0].base, str) else "tokens"
    return Pairs(path.name.partition(".")[0], modality, pairs, about)


def _name(name: str) -> str:
    """A name that an address can have: "S1+1" as "S1_next", "S1-1" as "S1_before", ",_B" as "comma_B"."""
    name = name.replace("+1", "_next").replace("-1", "_before").replace(",", "comma")
    return "".join(one if one.isalnum() else "_" for one in name)


def _pair(number: int, one: dict, name: str) -> Pair:
    try:
        answers, wrong = (list(one.get(key, [])) for key in ("answers", "wrong_answers"))
        several = any(isinstance(each, list) for each in (*answers, *wrong))
        if several:
            raise ValueError(f"answers {answers} at {len(answers)} positions; a task has one place to answer at: give "
                             "a prompt for each position, up to it")
        of_ids = not isinstance(one["clean"], str)
        spelled = lambda some: tuple((each,) if of_ids else each for each in some)
        return Pair(one["clean"], one["corrupt"], (), answers=spelled(answers), wrong=spelled(wrong))
    except KeyError as cause:
        raise ValueError(f"{name}, prompt {number}: no {cause.args[0]!r}; it has {', '.join(one)}") from cause
    except (ValueError, TypeError, AttributeError) as cause:
        raise ValueError(f"{name}, prompt {number}: {cause}") from cause
