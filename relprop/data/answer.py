"""Questions about a paragraph whose answer stands in it: which words a language model should answer from is known.

The file does not ship. Reference: P. Rajpurkar, R. Jia and P. Liang, "Know What You Don't Know: Unanswerable Questions
for SQuAD", ACL 2018.
"""
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..target import Reading, Target, Token, Vocabulary
from .example import Data, Example, limited

PROMPT = "{context}\nQuestion: {question}\nAnswer:"


@dataclass(frozen=True)
class Beginning(Target):
    """The logit of the first token of a text, where the model answers."""

    text: str

    def resolved(self, vocabulary: Vocabulary) -> Token:
        """The token. Raises: ValueError without a tokenizer, or for a text of no token."""
        if vocabulary.tokenizer is None:
            raise ValueError(f"no tokenizer to find the first token of {self.text!r}; load the model with one")
        pieces = vocabulary.tokenizer.encode(f" {self.text}", add_special_tokens=False)
        said = [piece for piece in pieces if vocabulary.tokenizer.decode([piece]).strip()]  # not the space alone
        if not said:
            raise ValueError(f"{self.text!r} is no token of this model")
        return Token(said[0])

    def value(self, reading: Reading) -> Tensor:
        return self.resolved(reading.vocabulary).value(reading)


def squad(path: str | Path, count: int | None = 500, *, seed: int = 0, length: int | None = None) -> Data:
    """Paragraphs with a question, as a prompt for a language model; asked for is the first token of the answer, and the
    words of the answer, where it stands in the paragraph, are marked.

    Questions without an answer are left out. Rows about the same article are a group.

    Args: path: a .json file as SQuAD publishes it (dev-v2.0.json), or a folder with one. count: how many, drawn by the
        seed; None: all. length: leave out paragraphs of more words; None: none.
    Raises: ValueError for another file, and for an answer that does not stand where the file says.
    """
    path = _found(Path(path))
    lines = [line for line in _questions(path) if length is None or len(line["context"].split()) <= length]
    if not lines:
        raise ValueError(f"no question with an answer in {path.name}, in a paragraph of at most {length} words")
    return Data("squad", "text", limited(_example, lines, count, seed), {"file": path.name, "count": count,
                                                                         "seed": seed, "length": length})


def _found(path: Path) -> Path:
    found = sorted(path.glob("dev*.json")) or sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not found or not found[0].is_file():
        raise ValueError(f"no .json of SQuAD at {path}; give dev-v2.0.json or a folder with it")
    return found[0]


def _questions(path: Path) -> Iterator[dict]:
    """Every question with its first answer."""
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        for article in articles:
            for paragraph in article["paragraphs"]:
                for one in paragraph["qas"]:
                    if one["answers"]:
                        answer = one["answers"][0]
                        yield {"context": paragraph["context"], "question": one["question"].strip(),
                               "answer": answer["text"], "start": int(answer["answer_start"]),
                               "group": article["title"], "id": one["id"]}
    except (KeyError, TypeError, json.JSONDecodeError) as cause:
        what = f"no {cause.args[0]!r}" if isinstance(cause, KeyError) else str(cause)
        raise ValueError(f"{path.name} is not laid out as SQuAD's files ({what})") from cause


def _example(line: dict) -> Example:
    start, end = line["start"], line["start"] + len(line["answer"])
    if line["context"][start:end] != line["answer"]:
        raise ValueError(f"question {line['id']}: {line['answer']!r} does not stand at {start} of its paragraph")
    text = PROMPT.format(context=line["context"], question=line["question"])
    words = tuple(match.span() for match in re.finditer(r"\S+", text))
    marked = torch.tensor([first < end and start < last for first, last in words])
    return Example(input=text, target=Beginning(line["answer"]), words=words, marked=marked, group=line["group"])
