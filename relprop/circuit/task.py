"""What a circuit is asked to do: clean and corrupted inputs, the metric that tells them apart, and names of positions.

A task is of no model; `Task.prepared` makes it ready for one, and checks that it can be asked of it.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..address import Spans
from ..data import Matched, Pair, Pairs, matched
from ..data import pairs as pairs_of
from ..data.pair import token
from ..errors import Undefined
from ..intervene import Places, Spot
from ..load import load
from ..mediation import KL, LogOdds, Margin, Mass, Outcome, Question, Value, mediators_of
from ..mediation.experiment import check_pair
from ..mediation.outcome import answered_at
from ..mediation.outcome import outcome as outcome_of
from ..mediation.stage import read
from ..mediation.task import placed, ready, spanned
from ..subject import Subject
from ..target import Class, Contrast, Token
from ..tokens import Batch, ImageUnits, TextUnits

ABLATIONS = ("resample", "mean", "mean by position", "zero")
"""What is put in the place of a clean value: that of the corrupted input, the mean over the reference inputs and their
positions, the mean over them at each position, or zero."""
LEVELS = {"heads": ("L*.attn.H*", "L*.cross.H*"), "mlps": ("L*.mlp",), "neurons": ("L*.mlp.N*",),
          "heads and mlps": ("L*.attn.H*", "L*.cross.H*", "L*.mlp")}
"""Places that are nodes, by level; " at positions" behind it: each at each position. There is "edges", too."""
AT = " at positions"
METRICS = ("logit difference", "probability difference", "smallest logit difference", "KL")


@dataclass(frozen=True, eq=False)
class Task:
    """Clean and corrupted inputs, row by row of the same length, and a metric that the corruption changes.

    Args:
        clean, corrupted: what `Subject.prepare` takes.
        metric: an `Outcome` of `relprop.mediation`, or a target; of the clean input where it is left open.
        spans: positions by name, of both inputs: {"S1": [3, 4], ...}, one or several for each row.
        groups: which rows go together, one label each, as templates do: means are of reference inputs of a row's own
            group; None: all go together.
        reference: inputs that means are of, `reference_groups` their groups; None: the corrupted ones.
        about: how it was made, for reports.
    """

    name: str
    clean: object
    corrupted: object
    metric: object = None
    spans: Spans = field(default_factory=dict)
    groups: Sequence[object] | None = None
    reference: object = None
    reference_groups: Sequence[object] | None = None
    about: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, subject: Subject, pairs: Pairs, *, metric: str | Outcome | None = None,
           reference: Pairs | None = None) -> Task:
        """The task that pairs are: the base is clean, the counterfactual corrupted.

        Args: metric: one of `METRICS`, of the pairs' answers and wrong answers, or an `Outcome`; None: the one that
                suits them, the logit difference where there is one of each. reference: pairs whose counterfactuals
            means are of, more than there are rows; None: the rows' own.
        Spans are those that are at the same positions on both sides, and of texts with any "end", where the model
        answers; pairs of one template and order are a group.

        Raises: ValueError for sides that differ in their number of tokens, for answers of several tokens, with what
            they are, for pairs without answers, and for a metric that does not suit them.
        """
        found = matched(subject, pairs)
        same = {name: at for name, at in found.spans.items() if at == found.counterfactual_spans[name] and all(at)}
        outcome = metric if isinstance(metric, Outcome) else _metric(subject, pairs, found, metric)
        named = {**_numbered(found, pairs), **same}
        if named and "end" not in named and isinstance(found.base.units, TextUnits):
            named["end"] = _answered(found.base)
        more = {} if reference is None else {"reference": matched(subject, reference).counterfactual,
                                             "reference_groups": _groups(reference)}
        return cls(pairs.name, found.base, found.counterfactual, outcome, named,
                   groups=_groups(pairs), about={**pairs.about, "pairs": pairs.fingerprint()}, **more)

    @classmethod
    def named(cls, subject: Subject, what: str | Pairs, *, count: int | None = None, seed: int = 0,
              metric: str | Outcome | None = None, references: int | None = None) -> Task:
        """The task of this name: see `relprop.data.pairs`, such as "ioi", "greater-than", "docstring", "pronouns",
        "induction", "digits-swap", or "prompts:FILE.json".

        Args: references: how many more pairs are drawn, whose counterfactuals means are of; None: the rows' own.
        Raises: as `of` and `relprop.data.pairs`.
        """
        drawn = partial(pairs_of, what, tokenizer=subject.tokenizer)
        more = None if references is None else drawn(count=references, seed=seed + 1)
        return cls.of(subject, drawn(count=count, seed=seed), metric=metric, reference=more)

    def prepared(self, subject: Subject) -> Prepared:
        """The task for this model, checked.

        Raises: ValueError for inputs of different length or number, with both tokenisations, and for a metric that
            takes more than one run, as answers of several tokens do.
        """
        clean, corrupted = subject.prepare(self.clean), subject.prepare(self.corrupted)
        check_pair(clean, corrupted)
        if self.groups is not None and len(self.groups) != clean.rows:
            raise ValueError(f"{len(self.groups)} groups for {clean.rows} rows; give a label to each")
        missing = set(self.groups or ()) - set(self.reference_groups or self.groups or ())
        if missing:
            raise ValueError(f"no reference input is of the group {min(map(str, missing))!r}, of which a mean is "
                             "needed; give more of them, or no groups")
        outcome = outcome_of(self.metric)
        with ready(subject.model):
            questions = outcome.pairs(subject, clean, corrupted)
        if len(questions) > 1 or questions[0][0].batch is not clean:
            raise ValueError(f"{outcome.name(subject)} takes {len(questions)} runs of the model, since its answers are "
                             "several tokens; a circuit is of one run: give answers of one token each, such as their "
                             "first tokens that differ")
        return Prepared(self, subject, clean, corrupted, outcome, questions[0])


@dataclass(frozen=True, eq=False)
class Prepared:
    """A task ready for a model: both inputs as it takes them, and where in its output the metric is read."""

    task: Task
    subject: Subject
    clean: Batch
    corrupted: Batch
    outcome: Outcome
    questions: tuple[Question, Question]

    @property
    def rows(self) -> int:
        return self.clean.rows

    @property
    def model(self) -> nn.Module:
        return self.subject.model

    def take(self, rows: Sequence[int] | Tensor) -> Prepared:
        """The task of these rows alone."""
        index = torch.as_tensor(rows)
        questions = tuple(question.take(index) for question in self.questions)
        groups = None if self.task.groups is None else [self.task.groups[row] for row in index.tolist()]
        task = replace(self.task, clean=questions[0].batch, corrupted=questions[1].batch, groups=groups,
                       spans=spanned(self.task.spans, index), reference=self.reference,
                       reference_groups=self.reference_groups)
        return replace(self, task=task, clean=questions[0].batch, corrupted=questions[1].batch, questions=questions)

    def value(self, output: Any, rows: Sequence[int] | None = None, *, side: int = 0) -> Tensor:
        """The metric in an output of the model, (R,), with its gradient.

        Args: rows: of the task that the output is of; None: all. side: 1 where it is of the corrupted inputs.
        """
        question = self.questions[side]
        rows = list(range(self.rows)) if rows is None else list(rows)
        at = None if question.at is None else question.at[rows]
        return self.outcome.value([read(question, output, at, rows=rows)])

    def forward(self, side: int = 0) -> Tensor:
        """The metric of the clean or the corrupted inputs, (B,), float64. Cost: one forward pass.

        Raises: Undefined where it is no number; ValueError that names weights that are none.
        """
        with ready(self.model):
            output = self.subject.forward((self.clean, self.corrupted)[side])
            found = self.value(output, side=side).double().cpu()
        if not bool(found.isfinite().all()):
            self.subject.check_weights()
            row = int((~found.isfinite()).nonzero()[0])
            raise Undefined(f"{self.outcome.name(self.subject)} of row {row} of task {self.task.name!r} is "
                            f"{float(found[row])} on the {('clean', 'corrupted')[side]} inputs; leave the row out, or "
                            "take another metric or a wider dtype")
        return found

    @cached_property
    def measured(self) -> tuple[Tensor, Tensor]:
        """The metric of the clean and of the corrupted inputs, (B,) each, float64. Cost: two forward passes, once."""
        return self.forward(0), self.forward(1)

    @property
    def reference(self) -> Batch:
        """The inputs that means are of: of some rows of a task, those of all its rows."""
        return self.corrupted if self.task.reference is None else self.subject.prepare(self.task.reference)

    @property
    def reference_groups(self) -> Sequence[object] | None:
        """Their groups, None where all go together."""
        return self.task.groups if self.task.reference_groups is None else self.task.reference_groups

    @property
    def places(self) -> Places:
        """What positions of addresses are counted by."""
        return placed(self.subject, self.task.spans, torch.arange(self.rows))

    def positions(self) -> list[str]:
        """Names of the positions that nodes are at: those of the task, else the number of each.

        Raises: ValueError where rows differ in length, and no position has a name.
        """
        if self.task.spans:
            return list(self.task.spans)
        real = self.questions[0].prompt
        if isinstance(self.clean.units, ImageUnits) and self.clean.units.grid is not None:
            rows, columns = self.clean.units.grid
            return [str(position) for position in range(self.subject.prefix_tokens + rows * columns)]
        if real is None:
            raise ValueError(f"task {self.task.name!r} names no positions; give it spans={{'name': positions}}")
        lengths = real.sum(1).unique().tolist()
        if len(lengths) > 1:
            raise ValueError(f"rows of task {self.task.name!r} have {lengths[0]} to {lengths[-1]} tokens, so that "
                             "numbers of positions are not the same in each; name them with spans=, or take rows of "
                             "one length")
        return [str(position) for position in range(lengths[0])]

    def patterns(self, level: str | Sequence[str]) -> list[str]:
        """The patterns of addresses that a level is of, of which a model may not have all; see `nodes`."""
        known = [*LEVELS, *(f"{name}{AT}" for name in LEVELS)]
        if not isinstance(level, str):
            if not level:
                raise ValueError("no address to score; give some, such as ['L*.attn.H*@end'], or a level: "
                                 f"{', '.join(known)}")
            return list(level)
        if level not in known:
            raise ValueError(f"no level {level!r} of nodes; there are {', '.join(known)}, or give a list of addresses")
        found = LEVELS[level.removesuffix(AT)]
        places = [f"@{place}" for place in self.positions()] if level.endswith(AT) else [""]
        return [f"{pattern}{place}" for pattern in found for place in places]

    def nodes(self, level: str | Sequence[str]) -> dict[str, list[Spot]]:
        """The nodes of a level by name, in the order of the model, and what is reached for each.

        Args: level: of `LEVELS`, with " at positions" behind it or not; or addresses and patterns, such as
            ["L*.attn.H*@end", "L*.mlp"].
        Raises: ValueError for another level, and for one that the model does not have.
        """
        given, patterns = not isinstance(level, str), self.patterns(level)
        found: dict[str, list[Spot]] = {}
        for pattern in patterns:
            try:
                found |= mediators_of(self.subject, self.clean, pattern)
            except ValueError as cause:
                if given:
                    raise
                missing = cause
        if not found:
            raise ValueError(f"{self.subject.name} has no {level}: {missing}") from missing
        return dict(sorted(found.items(), key=_order))  # stable: within a part as they were found


def _order(entry: tuple[str, list[Spot]]) -> tuple[int, str]:
    address = entry[1][0].site.address
    return -1 if address.layer is None else address.layer, address.part


def posed(subject: str | Subject | nn.Module | tuple, task: Task | Pairs | str | Prepared, *, metric: object = None,
          seed: int = 0) -> Prepared:
    """A task ready for a model, from what a caller gives for both; with another metric, if one is given.

    Raises: as of `Task.named` and `Task.prepared`.
    """
    if isinstance(task, Prepared):
        return task if metric is None else replace(task.task, metric=metric).prepared(task.subject)
    subject = subject if isinstance(subject, Subject) else load(*subject) if isinstance(subject, tuple) \
        else Subject.from_module(subject) if isinstance(subject, nn.Module) else load(subject)
    task = task if isinstance(task, Task) else Task.named(subject, task, seed=seed)
    return (task if metric is None else replace(task, metric=metric)).prepared(subject)


def check_ablation(ablation: str, known: Sequence[str] = ABLATIONS) -> str:
    """The ablation, if it is one of these. Raises: ValueError for another."""
    if ablation not in known:
        raise ValueError(f"no ablation {ablation!r}; there {'are' if len(known) > 1 else 'is'} {', '.join(known)}")
    return ablation


# -- the metric of pairs ----------------------------------------------------------------------------------------------


def _metric(subject: Subject, pairs: Pairs, found: Matched, metric: str | None) -> Outcome:
    if metric is not None and metric not in METRICS:
        raise ValueError(f"no metric {metric!r}; there are {', '.join(METRICS)}, or an Outcome of relprop.mediation")
    if metric == "KL":
        return KL()
    sides = [[_answers(one)[side] for one in pairs.pairs] for side in (0, 1)]
    for row, both in enumerate(zip(*sides)):
        if not all(both):
            raise ValueError(f"pair {row} of {pairs.name!r} has no {'wrong ' * bool(both[0])}answers, which a metric "
                             "weighs; give it some, or metric='KL'")
    suits = metric or ("logit difference" if all(len(one) == 1 for side in sides for one in side)
                       else "smallest logit difference" if all(len(one) == 1 for one in sides[0])
                       else "probability difference")
    if suits != "probability difference" and any(len(one) > 1 for one in sides[0]) or \
            suits == "logit difference" and any(len(one) > 1 for one in sides[1]):
        raise ValueError(f"{suits} is of one answer{' and one wrong one' * (suits == METRICS[0])}, and {pairs.name!r} "
                         "has several; take the probability difference, or the smallest logit difference")
    if not isinstance(found.base.units, TextUnits):
        if suits != "logit difference":
            raise ValueError(f"{suits} is of tokens; of classes there is the logit difference")
        return Value([Contrast(*(_class(subject, one[0]) for one in both)) for both in zip(*sides)])
    ids = [[[token(text, subject.tokenizer) for text in one] for one in side] for side in sides]
    if suits == "logit difference":
        return LogOdds(*ids)
    return {"probability difference": Mass, "smallest logit difference": Margin}[suits](*ids)


def _groups(pairs: Pairs) -> list[str] | None:
    """Which pairs go together: those of a template and order; None where these are not known."""
    found = [" ".join(filter(None, [one.facts.get("template"), one.facts.get("order")])) for one in pairs.pairs]
    return found if all(found) else None


def _answered(batch: Batch) -> list[list[int]]:
    """Where the model answers in each row of texts, counted without padding."""
    own = ~torch.tensor(batch.units.padding)
    return [[int(mine[:answered_at(batch, row, Token(0))].sum())] for row, mine in enumerate(own)]


def _numbered(found: Matched, pairs: Pairs) -> dict[str, list[list[int]]]:
    """Positions that a file of prompts gives by number, counted without the special tokens that a tokenizer adds."""
    named = pairs.about.get("positions", {})
    shift = [0] * found.rows
    if named and isinstance(found.base.units, TextUnits):
        marks = [[one for one, gone in zip(*row) if not gone] for row in
                 zip(found.base.units.special, found.base.units.padding)]
        shift = [next((at for at, special in enumerate(row) if not special), 0) for row in marks]
    return {name: [[at + one] for one in shift] for name, at in named.items()}


def _answers(one: Pair) -> tuple[Sequence[object], Sequence[object]]:
    """What is right and what is wrong on the base. Of two continuations the first is the counterfactual's."""
    if one.answers or len(one.continuations) != 2:
        return one.answers, one.wrong
    return one.continuations[1:], one.continuations[:1]


def _class(subject: Subject, label: object) -> Class:
    return subject.targets(label, 1).targets[0]
