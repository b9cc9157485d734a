"""Causal mediation: how much of the effect of an input on an outcome passes through a part of the model.

    >>> import relprop
    >>> found = relprop.effects("reviews-bert", "A wonderful film.", "A terrible film.", "POSITIVE", at="L*.attn.H*")
    >>> found.indirect.shape == (len(found.mediators), 1)
    True

Reference: Vig et al. 2020 (Causal mediation analysis for interpreting neural NLP: the case of gender bias); Pearl 2001
(Direct and indirect effects).
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from os import PathLike

from torch import Tensor, nn

from ..address import Spans
from ..intervene import Intervention
from ..subject import Subject
from .choice import Margin, Mass
from .continuation import Difference, LogOdds, Ratio
from .counterpart import Align
from .estimate import checked_estimate, ranking
from .example import by_layer, by_mediator, susceptible
from .experiment import Experiment, experiment
from .finding import Effects
from .measurement import Measurement, checked, result
from .outcome import KL, Outcome, Question, Value
from .path import path_effects
from .record import measured
from .statistic import RESAMPLES
from .subset import Subset, Subsets, subset, subsets
from .task import At, mediators_of, ready, task
from .tracing import tracing


def effects(subject: str | Subject | nn.Module | tuple, base: object, counterfactual: object = None,
            outcome: object = None, *, at: At = "L*.attn.H*", kind: str | Sequence[str] = ("total", "indirect"),
            scale: str = "difference", fixed: Intervention | None = None, keep: Tensor | None = None,
            spans: Spans | None = None, align: Align | str | None = None, groups: Sequence[object] | None = None,
            prompt_only: bool = False, estimate: str | None = None, verify: int | None = None,
            out: str | PathLike | None = None, batch_size: int | None = None, resamples: int = RESAMPLES, seed: int = 0,
            show_progress: bool = False) -> Effects:
    """Effects of changing the base into the counterfactual, in total and through each mediator: exact, by running the
    model with the mediator changed.

    Under `accelerate launch` or `torchrun` processes that ask the same share the work, and each returns everything:
    every one of them must make the call. Without GPUs it takes `accelerate launch --multi_gpu --num_processes 2`; with
    `--cpu`, accelerate starts one process whatever it is asked for. Processes that ask of other inputs or mediators
    each do their own.

    Args:
        subject: what `relprop.load` takes, a `Subject`, or any `nn.Module`.
        base, counterfactual: inputs, one pair a row, of the same length or with `align`; see `Subject.prepare`. In the
            place of both `relprop.data.Pairs`, or `Matched` ones, which bring their spans, groups, alignment and, where
            none is given, the log-odds of their continuations as the outcome.
        outcome: a `Ratio`, `Difference` or `LogOdds` of two candidates, `KL`, any target (a logit, `Probability(...)`,
            `Contrast(...)`, a function of the output), or an `Outcome` of one's own. None: the base's prediction.
        at: mediators: sites or patterns of sites, "L*.attn.H*", "L*.mlp@-1", "L*.attn.H*.pattern", each place one; or
            a mapping of names to sites that are changed together, {"layer 3": "L3.attn.H*"}.
        kind: of "total", "direct", "indirect" and "controlled".
        scale: "difference", or "ratio", y / y(base) - 1, of Vig et al. 2020.
        fixed: for controlled effects, what the mediator is held at in both inputs, such as `Zero()`.
        keep: which of the pairs count, bool (B,), such as `susceptible` says; None: all.
        spans: positions by name, in the base, for mediators such as "L*.mlp@profession"; see `relprop.address`.
        align: where base and counterfactual differ in their number of tokens, the position in the counterfactual for
            each one of the base, -1 for none: a tensor (B, T) or (T,) over the positions of the batch, or a list for
            each pair that does not count padding; of pairs "slots", see `relprop.data.matched`. A mediator takes the
            value at the position that stands for its own, and keeps its own where none does; of direct effects the
            base's mediators are meant at the counterfactual's positions that stand for them. Attention patterns cannot
            be aligned.
        groups: of each pair, where pairs of the same group are not independent, such as templates with the same
            profession; None in the place of a group: in none. Intervals draw whole groups, and p-values flip the
            signs of whole groups.
        prompt_only: of outcomes that continue the prompt, mediators change at the prompt's positions alone (of
            patterns: rows and columns), as Vig et al. do with causal models.
        estimate: rank the mediators by this estimate of their indirect effects, one of
            `relprop.approximation.METHODS`, and return the exact effects of the `verify` first (20 where it is not
            given). `about["estimate"]` has the estimate of every mediator, and how well it ranks: correlations and
            recall over the first and as many of the rest, drawn at random and recomputed too.
        out: a folder that outcomes are written to as the sweep goes; a call with the same arguments goes on where one
            was stopped. Processes share the work through it; on several machines it must be one that all of them see.
            Without it they share the work through their group.
        batch_size: rows run at once; None: by the length of the input. It is halved where memory runs out.
        resamples, seed: of the intervals and p-values.
    Returns: outcomes and effects of each mediator on each pair, and their summaries; with an estimate, of the first of
        its ranking, in its order, the q-values being over these.
    Raises: ValueError for inputs, mediators or outcomes that cannot be, and for a folder that holds something else, or
        a sweep of other arguments, with what differs; Undefined for an outcome that never changes,
        or that is zero in the base on the scale "ratio".
    """
    kinds = checked(kind, scale, fixed)
    verify = checked_estimate(estimate, verify, kinds)
    asked = task(subject, base, counterfactual, outcome, keep=keep, spans=spans, align=align, groups=groups,
                 prompt_only=prompt_only, batch_size=batch_size)
    with ready(asked.subject.model):
        mediators = asked.mediators(at)
        ranked = None if estimate is None else ranking(asked, mediators, estimate, verify=verify, scale=scale,
                                                       seed=seed)
        chosen = mediators if ranked is None else {name: mediators[name] for name in ranked.chosen}
        measurement = Measurement.of(asked, chosen, kinds, fixed)
        found = measured(measurement, out, show_progress=show_progress)
    made = partial(result, asked, scale=scale, resamples=resamples, seed=seed)
    about = {"fixed": repr(fixed) if fixed else None}
    if ranked is None:
        return made(tuple(mediators), found, about=about)
    exact = made(tuple(chosen), found, about=about, summed=False).indirect.mean(1)
    return made(tuple(chosen)[:verify], ranked.split(found), about={**about, "estimate": ranked.told(exact)})


__all__ = ["KL", "Difference", "Effects", "Experiment", "LogOdds", "Margin", "Mass", "Outcome", "Question", "Ratio",
           "Subset", "Subsets", "Value", "by_layer", "by_mediator", "effects", "experiment", "mediators_of",
           "path_effects", "subset", "subsets", "susceptible", "tracing"]
