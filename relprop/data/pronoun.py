"""Pairs of sentences that differ in a pronoun, or in the group that they are about, from published files.

References: J. Zhao et al., "Gender bias in coreference resolution: evaluation and debiasing methods", NAACL 2018
(WinoBias); R. Rudinger et al., "Gender bias in coreference resolution", NAACL 2018 (Winogender); J. Vig et al.,
"Investigating gender bias in language models using causal mediation analysis", NeurIPS 2020, for how they are paired;
N. Nangia et al., "CrowS-Pairs: a challenge dataset for measuring social biases in masked language models", EMNLP 2020.
"""
from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from .alignment import differing
from .example import chosen
from .pair import Pair, Pairs, Ranges

MALE = {"she": "he", "her": "his"}
PRONOUNS = (*MALE, *MALE.values(), "him", "himself", "herself")
_BRACKET = re.compile(r"\[([^\]]+)\]")
_KINDS = {"$NOM_PRONOUN": ("she", "he"), "$POSS_PRONOUN": ("her", "his"), "$ACC_PRONOUN": ("her", "him")}


def winobias(path: str | Path, count: int | None = None, *, seed: int = 0, split: str = "dev") -> Pairs:
    """WinoBias of type 1: a context up to "she" and the same up to "he", and how it goes on, as fits an occupation that
    is male by stereotype, and one that is female. Their spans are "male" and "female", where they stand in the context.

    Lines 2k - 1 and 2k with one context are a pair; those with several pronouns, "him", or pronouns of two kinds are
    left out, as by Vig et al. 2020.

    Args: path: `pro_stereotyped_type1.txt.dev` or its folder. split: "dev" or "test", of a folder.
    Raises: ValueError for a folder without the file.
    """
    path = Path(path) / f"pro_stereotyped_type1.txt.{split}" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f"no {path}; numbered sentences of WinoBias are expected there")
    numbered = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    lines = [re.sub(r"^\d+ ", "", line) for line in numbered]
    found = [pair for pair in map(_winobias, lines[::2], lines[1::2]) if pair is not None]
    return Pairs("winobias", "text", list(chosen(found, count, seed)), {"split": split, "count": count, "seed": seed})


def winogender(path: str | Path, count: int | None = None, *, seed: int = 0, statistics: str = "bls") -> Pairs:
    """Winogender: a context up to "she" and the same up to "he", and how it goes on, as fits the one of occupation and
    other participant that is male by statistics of employment, and the other one.

    Args: path: folder with `winogender_templates_structurefilter.tsv` or `winogender_templates.tsv`, of which pairs
            with one context are taken, and `winogender_occupation_stats.tsv`. statistics: "bls" or "bergsma", by which
            an occupation is female that more than half are women of.
    Raises: ValueError for a folder without the files, or other statistics.
    """
    if statistics not in ("bls", "bergsma"):
        raise ValueError(f"statistics are bls or bergsma, not {statistics!r}")
    names = ("winogender_templates_structurefilter.tsv", "winogender_templates.tsv")
    file = next((Path(path) / name for name in names if (Path(path) / name).is_file()), None)
    shares = Path(path) / "winogender_occupation_stats.tsv"
    if file is None or not shares.is_file():
        raise ValueError(f"no {names[1]} with {shares.name} in {path}")
    female = {row["occupation"]: float(row[f"{statistics}_pct_female"]) for row in _table(shares)}
    sentences = list(_table(file))
    found = [pair for a, b in zip(sentences[::2], sentences[1::2]) for pair in _winogender(a, b, female)]
    return Pairs("winogender", "text", list(chosen(found, count, seed)),
                 {"statistics": statistics, "count": count, "seed": seed})


def crows(path: str | Path, count: int | None = None, *, seed: int = 0, bias: str | None = None) -> Pairs:
    """CrowS-Pairs: a sentence that says more of a stereotype, and the same with another group in it. The span "changed"
    is the words that differ; there are no continuations.

    Args: path: `crows_pairs_anonymized.csv` or its folder. bias: its type, such as "gender"; None: all.
    Raises: ValueError for a folder without the file, or a type that it does not have.
    """
    path = Path(path) / "crows_pairs_anonymized.csv" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f"no {path}; the table of CrowS-Pairs is expected there")
    rows = list(_table(path, ","))
    kinds = sorted({row["bias_type"] for row in rows})
    if bias is not None and bias not in kinds:
        raise ValueError(f"no bias {bias!r}; there are {', '.join(kinds)}")
    found = [pair for row in rows if bias in (None, row["bias_type"]) for pair in _crows(row)]
    return Pairs("crows", "text", list(chosen(found, count, seed)), {"bias": bias, "count": count, "seed": seed})


def _table(path: Path, delimiter: str = "\t") -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def _winobias(first: str, second: str) -> Pair | None:
    sides = [_cut(line) for line in (first, second)]
    if None in sides or sides[0][0] != sides[1][0]:
        return None
    (context, a, *_), (_, b, *_) = sides
    forms = [{"she": 0, "he": 0, "her": 1, "his": 1}.get(pronoun) for pronoun in (a, b)]
    if None in forms or forms[0] != forms[1] or (a in MALE) == (b in MALE):
        return None
    female, male = sorted(sides, key=lambda side: side[1] not in MALE)
    spans = {name: side[3] for name, side in (("female", female), ("male", male)) if side[3] is not None}
    return _pronouns(context, female[1], None, (male[2], female[2]), {}, spans)


def _cut(line: str) -> tuple[str, str, str, Ranges | None] | None:
    """A sentence before its pronoun, the pronoun, what comes after it, and where before it the one is whom it means;
    None if it has not one pronoun.
    """
    marked = list(_BRACKET.finditer(line))
    found = [match for match in marked if match[1].lower() in PRONOUNS]
    if len(found) != 1:
        return None
    plain = lambda text: text.replace("[", "").replace("]", "")
    meant = None if marked[0] is found[0] else ((marked[0].start(), marked[0].end() - 2),)  # without its brackets
    return plain(line[:found[0].start()]), found[0][1].lower(), plain(line[found[0].end():]), meant


def _pronouns(context: str, female: str, male: str | None, continuations: tuple[str, str], facts: dict,
              spans: dict[str, Ranges] | None = None) -> Pair:
    """The context up to the female pronoun, and up to the male one."""
    sides = [context + pronoun for pronoun in (female, male or MALE[female])]
    places = [{**(spans or {}), "pronoun": ((len(context), len(side)),)} for side in sides]
    return Pair(*sides, continuations, *places, {"pronoun": female, **facts})


def _winogender(one: dict[str, str], other: dict[str, str], female: dict[str, float]) -> Iterator[Pair]:
    """The pair of two templates, none where their contexts differ."""
    kind = next((kind for kind in _KINDS if kind in one["sentence"]), None)
    contexts = [row["sentence"].partition(kind or "$") for row in (one, other)]
    same = [(context, row["occupation(0)"], row["other-participant(1)"]) for (context, *_), row in
            zip(contexts, (one, other))]
    answers = {row["answer"]: rest for (*_, rest), row in zip(contexts, (one, other))}
    occupation, participant = same[0][1:]
    if kind is None or same[0] != same[1] or set(answers) != {"0", "1"} or not all(answers.values()) \
            or occupation not in female:
        return
    context, spans = "", {}
    for part in re.split(r"(\$OCCUPATION|\$PARTICIPANT)", contexts[0][0]):
        name = {"$OCCUPATION": "occupation", "$PARTICIPANT": "participant"}.get(part)
        word = {"occupation": occupation, "participant": participant}.get(name, part)
        if name is not None:
            spans[name] = ((len(context), len(context) + len(word)),)
        context += word
    of_women = female[occupation] > 50
    continuations = (answers["1"], answers["0"]) if of_women else (answers["0"], answers["1"])
    facts = {"occupation": occupation, "participant": participant, "female": female[occupation]}
    yield _pronouns(context, *_KINDS[kind], continuations, facts, spans)


def _crows(row: dict[str, str]) -> Iterator[Pair]:
    """A row as a pair, none where words are only added, so that there is nothing to put in their place."""
    more, less = row["sent_more"], row["sent_less"]
    found = differing(more, less)
    if found is None:
        return
    spans = [{"changed": side} for side in found]
    yield Pair(more, less, (), *spans, {"bias": row["bias_type"], "direction": row["stereo_antistereo"]})
