"""ERASER's movie reviews as they were released: a file of annotations and a folder of documents. They do not ship.

Reference: J. DeYoung et al., "ERASER: A Benchmark to Evaluate Rationalized NLP Models", ACL 2020.
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .example import Data, limited
from .lines import SUFFIXES, read
from .review import marked_passage, movies, passages_of

WHOLE = 10**9  # words of a passage that is the whole document


def eraser(folder: str | Path, count: int | None = None, *, seed: int = 0, length: int | None = None,
           split: str = "test") -> Data:
    """Reviews, or passages of them, with the words that people gave as the reason for the label.

    Args: folder: with `{split}.jsonl` (annotation_id, classification, evidences) and the texts, a sentence a line, in
        `docs/` or in `docs.jsonl` (docid, document); or in the layout of `movies`. count: how many, drawn by the seed;
        None: all. length: words that whole sentences of a document are packed to; None: the whole document, of which
        the model reads as much as it can. A passage without evidence is left out.
    Raises: ValueError for a folder without these, and for evidence that goes beyond its document.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    path = next((folder / f"{split}{end}" for end in SUFFIXES if (folder / f"{split}{end}").is_file()), None)
    if path is None:
        raise ValueError(f"no {split}.jsonl in {folder}; ERASER's folder has it, and the texts in docs/")
    length = WHOLE if length is None else length
    if not ((folder / "docs").is_dir() or (folder / "docs.jsonl").is_file()):
        return movies(path, count, seed=seed, length=length)
    parts = [part for line in _annotated(path) for part in passages_of(line, length)]
    if not parts:
        raise ValueError(f"no passage with evidence in {path}")
    return Data("movies", "text", limited(marked_passage, parts, count, seed),
                {"file": path.name, "count": count, "seed": seed, "length": length})


def _annotated(path: Path) -> Iterator[dict]:
    """Each annotation with the words and sentences of its document."""
    together = {line["docid"]: line["document"] for line in read(path.parent / "docs.jsonl")} \
        if (path.parent / "docs.jsonl").is_file() else None
    for number, line in enumerate(read(path), start=1):
        try:
            spans = [(one["docid"], one["start_token"], one["end_token"]) for some in line["evidences"] for one in some]
            name, label = line["annotation_id"], line["classification"]
        except (KeyError, TypeError) as cause:
            raise ValueError(f"{path.name}, line {number}: no {cause.args[0]!r}; it is not ERASER's layout") from cause
        docid = spans[0][0] if spans else name
        text = _document(path.parent, docid) if together is None else together[docid]
        sentences = [sentence.split() for sentence in text.splitlines() if sentence.strip()]
        ends = [sum(map(len, sentences[:at + 1])) for at in range(len(sentences))]
        yield {"id": name, "label": label, "tokens": [word for sentence in sentences for word in sentence],
               "sent_ends": ends, "evidence": [[start, end] for _, start, end in spans]}


def _document(folder: Path, docid: str) -> str:
    file = folder / "docs" / docid
    if not file.is_file():
        raise ValueError(f"no document {docid!r} in {folder / 'docs'}")
    return file.read_text(encoding="utf-8")
