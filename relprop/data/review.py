"""Film reviews with what people marked in them: passages with rationales, sentences with a sentiment for every word.

The files do not ship. References: J. DeYoung et al., "ERASER: A Benchmark to Evaluate Rationalized NLP Models", ACL
2020 (movie reviews of O. Zaidan and J. Eisner, "Modeling Annotators", EMNLP 2008); R. Socher et al., "Recursive Deep
Models for Semantic Compositionality Over a Sentiment Treebank", EMNLP 2013.
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from .example import Data, Example, joined, limited, within
from .lines import found, read

LABELS = ("NEGATIVE", "POSITIVE")
NEUTRAL = 2  # of the treebank's labels 0 to 4
LENGTH = 90  # words of a passage: about 128 word pieces


def movies(folder: str | Path, count: int | None = 500, *, seed: int = 0, length: int = LENGTH) -> Data:
    """Passages of ERASER's movie reviews with the words that people gave as the reason for the review's label.

    Args: folder: a file, or a folder with one, of `movies_test_passages` (lines with words, evidence, label 0 or 1 and
        doc) or ERASER's own `test` (tokens, sent_ends, evidence, label NEG or POS), as .jsonl or .jsonl.gz. count: how
        many, drawn by the seed; None: all. length: words that whole sentences of a document are packed to; a passage
        without evidence is left out.
    Raises: ValueError for a folder without it, and for evidence that goes beyond the words.
    """
    path = found(folder, "movies_test_passages", "test")
    lines = [part for line in read(path) for part in ([line] if "words" in line else passages_of(line, length))]
    return Data("movies", "text", limited(marked_passage, lines, count, seed),
                {"file": path.name, "count": count, "seed": seed, "length": length})


def sst(folder: str | Path, count: int | None = 500, *, seed: int = 0) -> Data:
    """Sentences of the Stanford Sentiment Treebank with the sentiment that people gave to each word by itself.

    Labels are signed for the target, the sentence's own sentiment: label - 2, or 2 - label in a negative sentence. The
    words that speak for it are marked. Neutral sentences are left out.

    Args: folder: a file, or a folder with one, of `sst2_test_words` (words, leaf_labels, label 0 or 1) or the
        treebank's `test` (tokens, leaf_labels, label 0 to 4), as .jsonl or .jsonl.gz. count, seed: as of `movies`.
    Raises: ValueError for a folder without it, and for labels that are not one a word.
    """
    path = found(folder, "sst2_test_words", "test")
    lines = [line for line in read(path) if "words" in line or line["label"] != NEUTRAL]
    return Data("sst", "text", limited(_sentence, lines, count, seed), {"file": path.name, "count": count,
                                                                        "seed": seed})


def marked_passage(line: dict) -> Example:
    """A line with words, evidence, label and doc as an example."""
    text, words = joined(line["words"])
    return Example(input=text, target=LABELS[line["label"]], words=words,
                   marked=within(line["evidence"], len(words)), group=line["doc"])


def passages_of(line: dict, length: int) -> Iterator[dict]:
    """A document cut between sentences; a sentence that is longer than `length` is a passage of its own."""
    spans = [span for span in line["evidence"] if span[0] != span[1]]  # the release has empty ones
    evidence, starts = within(spans, len(line["tokens"])), [0]
    for start, end in zip([0, *line["sent_ends"]], [*line["sent_ends"], len(line["tokens"])], strict=True):
        if end - starts[-1] > length and start > starts[-1]:
            starts.append(start)
    for start, end in zip(starts, [*starts[1:], len(line["tokens"])], strict=True):
        marked = evidence[start:end].nonzero().flatten().tolist()
        if marked:
            yield {"words": line["tokens"][start:end], "evidence": [[at, at + 1] for at in marked],
                   "label": int(line["label"] == "POS"), "doc": line["id"]}


def _sentence(line: dict) -> Example:
    text, words = joined(line["words"] if "words" in line else line["tokens"])
    positive = line["label"] if "words" in line else int(line["label"] > NEUTRAL)
    sentiment = torch.tensor(line["leaf_labels"], dtype=torch.float64) - NEUTRAL
    labels = sentiment if positive else 0 - sentiment
    return Example(input=text, target=LABELS[positive], words=words, labels=labels, marked=labels > 0)
