"""Nodes and edges scored by gradients: one or a few passes for all of them.

A score is the change of what a part gives when it is ablated, times what the metric changes by per unit of that: first
order in the change, or a mean over places on the way to it. Scores estimate metric(ablated) - metric(clean), so that a
part which the task needs has the sign of the metric's fall; EAP's own code takes a loss, and has the other sign.

- `atp`: the gradient at the clean inputs, of nodes (attribution patching, Nanda 2023);
- `eap`: the same of edges (Syed et al. 2023);
- `eap-ig`: the mean gradient on the way from corrupted to clean: of the inputs, or of what one layer's heads or an MLP
  gives, all else clean, which counts for edges that leave it (Hanna et al. 2024);
- `clean-corrupted`: the mean of the gradients at both ends;
- `relp`: relevance per unit by rules of LRP (Jafari et al. 2025);
- `gim`: a gradient that self-repair does not hide (Edin et al. 2025).

Cost, in passes of the clean inputs (F forward, B backward), besides one row's for what the model is like: a forward of
the corrupted inputs and F + B; `clean-corrupted` twice that; `eap-ig` F + steps (F + B) along inputs, of a model of L
layers (1 + 2 L) times as many along activations. Edges take about two more B each time. Of GPT-2 small, 8 pairs of 16
tokens (`tests/bench/circuits.py`): all nodes 1.0 to 1.3 times two forwards and a backward; its 32,491 edges 2.0 to 2.9
times a forward and backward of clean and corrupted inputs together, `clean-corrupted` 3.2, `eap-ig` of 5 steps 6.3, in
0.2 GiB more. That grows with rows times positions times width times sources: rows are run in parts.

References: N. Nanda, "Attribution patching", 2023; A. Syed et al., "Attribution patching outperforms automated circuit
discovery", 2023; M. Hanna et al., "Have faith in faithfulness", 2024; F. Jafari et al., "RelP", 2025; J. Edin et al.,
"GIM: improved interpretability for large language models", 2025.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .. import composite as composites
from ..approximation import relp as relp_rules
from ..composite import Composite
from ..ops import activation, mul, norm, softmax
from ..result import Circuit
from . import edge, node
from .ablated import ablated
from .edge import Changes
from .plan import Plan, plan
from .record import graphed
from .task import Prepared

STEPS = 5
ALONG = ("inputs", "activations")
RULES = ("LN", "Identity", "Half", "AH")
"""Rules of RelP beside the 0-rule of linear maps: norms' scale held, activations passed, half to each factor of a gated
product; attention patterns held, which is off by default."""
ENTRIES = 1 << 27
"""Entries of what all sources change by that are kept at once: half a GiB in float32."""

Level = str | Sequence[str]
Score = Callable[[Plan, Prepared, Changes], Tensor]
"""Sums over rows of the scores of edges, (S, D)."""


def atp(task: Prepared, *, level: Level = "heads", ablation: str = "resample", batch_size: int | None = None
        ) -> Circuit:
    """Attribution patching: S(u) = d_u . dm/da_u at the clean inputs (Nanda 2023)."""
    return _nodes(task, level, ablation, "atp", node.at_clean, batch_size=batch_size)


def eap(task: Prepared, *, level: Level = "edges", ablation: str = "resample", batch_size: int | None = None
        ) -> Circuit:
    """Edge attribution patching: S(u, v) = d_u . dm/d(what v reads) at the clean inputs (Syed et al. 2023, eq. 2).

    Of a level of nodes, the sum over the edges that leave each, which is `atp`.
    """
    if level != "edges":
        return _nodes(task, level, ablation, "eap", node.at_clean, batch_size=batch_size)
    return _edges(task, ablation, "eap", _at_clean, batch_size=batch_size)


def relp(task: Prepared, *, level: Level = "heads", ablation: str = "resample", batch_size: int | None = None,
         rules: Sequence[str] = ("LN", "Identity", "Half"), composite: str | Composite | None = None) -> Circuit:
    """Relevance patching: the formula of `atp` and `eap` with relevance per unit in the place of the gradient (Jafari
    et al. 2025, eq. 3).

    The original's Identity-rule divides by x + 1e-6 sign x, which moves scores by some 1e-5; here it is exact.

    Args: rules: of `RULES`; linear maps have the 0-rule. composite: rules in their place.
    """
    how = rule_set(rules) if composite is None else composites.get(composite)
    return _by_rules(task, level, ablation, "relp", how, batch_size=batch_size)


def gim(task: Prepared, *, level: Level = "heads", ablation: str = "resample", batch_size: int | None = None,
        temperature: float = 2.0) -> Circuit:
    """Gradient interaction modifications: the formula of `atp` and `eap` under the rules of `relprop.composite.gim`
    (Edin et al. 2025). Args: temperature: of the softmax on the way back.
    """
    if not temperature > 0:
        raise ValueError(f"the temperature of a softmax is above 0, not {temperature}")
    return _by_rules(task, level, ablation, "gim", composites.gim(temperature),
                     batch_size=batch_size)


def eap_ig(task: Prepared, *, level: Level = "edges", ablation: str = "resample", batch_size: int | None = None,
           steps: int | Sequence[float] = STEPS, along: str = "inputs") -> Circuit:
    """Edge attribution patching with integrated gradients: the mean gradient over `steps` on the way (Hanna et al.
    2024, eqs. 4 and 5).

    The original pools the gradients of all activations' ways for all edges; here each way counts for what moves on it.

    Args: steps: k of them are the places 1/k, 2/k ... 1 of the way from clean to corrupted, along activations 0, 1/k
            ... (k - 1)/k, as in the original; or the places themselves, 0 clean and 1 corrupted. along: "inputs",
            embeddings on the way; or "activations", what the heads of one layer, or one MLP, give.
    """
    if along not in ALONG:
        raise ValueError(f"a way is along {' or '.join(ALONG)}, not {along!r}")
    points = _points(steps, first=1 if along == "inputs" else 0)
    if level == "edges":
        score = partial(_on_the_way, points) if along == "inputs" else partial(_one_by_one, points)
        return _edges(task, ablation, "eap-ig", score, batch_size=batch_size)
    estimate = partial(node.on_the_way, points)
    return _nodes(task, level, ablation, "eap-ig", estimate, batch_size=batch_size, moved=along == "inputs")


def clean_corrupted(task: Prepared, *, level: Level = "edges", ablation: str = "resample",
                    batch_size: int | None = None) -> Circuit:
    """The mean of the scores with the gradient at the clean and at the corrupted inputs, the two ends of the way of
    integrated gradients (Hanna et al. 2024, their code).
    """
    if level == "edges":
        return _edges(task, ablation, "clean-corrupted", _at_both, batch_size=batch_size)
    return _nodes(task, level, ablation, "clean-corrupted", node.at_both, batch_size=batch_size)


def rule_set(rules: Sequence[str]) -> Composite:
    """Rules of RelP by name, of `RULES`; those that are left out are the gradient.

    >>> rule_set(["LN"]).describe()["norm"], rule_set(["Half"]).describe()["norm"]
    ('norm.held', 'norm.gradient')
    """
    unknown = [one for one in rules if one not in RULES]
    if unknown or isinstance(rules, str):
        raise ValueError(f"rules of RelP are some of {', '.join(RULES)}, in a list, not {rules!r}")
    plain = {"LN": {"norm": norm.gradient}, "Identity": {"activation": activation.gradient},
             "Half": {"mul": mul.gradient}, "AH": {"softmax": softmax.taylor}}
    without = [name for name in RULES if name not in rules]
    changed = {kind: rule for name in without for kind, rule in plain[name].items()}
    return relp_rules(hold_attention="AH" in rules).but("relp", rules=changed)


# -- both levels ------------------------------------------------------------------------------------------------------


def _by_rules(task: Prepared, level: Level, ablation: str, method: str, rules: Composite, *,
              batch_size: int | None) -> Circuit:
    if level == "edges":
        return _edges(task, ablation, method, _at_clean, composite=rules, batch_size=batch_size)
    return _nodes(task, level, ablation, method, partial(node.by_rules, rules), batch_size=batch_size)


def _nodes(task: Prepared, level: Level, ablation: str, method: str, estimate: node.Estimate, *,
           batch_size: int | None, moved: bool = False) -> Circuit:
    scores, about = node.scores(task, level, ablation, estimate, moved=moved, batch_size=batch_size)
    return Circuit.of(scores, level=level if isinstance(level, str) else "nodes", method=method, about=about)


def _edges(task: Prepared, ablation: str, method: str, score: Score, *, composite: Composite | None = None,
           batch_size: int | None = None) -> Circuit:
    with graphed(task):
        made = plan(task, composite)
        gone = None if ablation == "resample" else ablated(task, made.wired.sources, ablation)
        total, metric = 0.0, torch.zeros(2, dtype=torch.float64)
        for rows in torch.arange(task.rows).split(batch_size or max(1, ENTRIES // made.entries)):
            some = task.take(rows)
            after, value = edge.corrupted(some, made) if gone is None else (
                {tap: one[rows.to(one.device)] for tap, one in gone.items()}, float("nan"))
            clean = made.record(some)
            metric += torch.tensor([float(clean.outcome.detach().sum()), value], dtype=torch.float64)
            total = total + score(made, some, Changes(made, clean, after))
    means = dict(zip(("clean", "corrupted"), (metric / task.rows).tolist()))
    scores = made.wired.graph.named(total / task.rows)
    return Circuit.of(scores, level="edges", method=method, about=means if gone is None else {})


# -- edges ------------------------------------------------------------------------------------------------------------


def _at_clean(made: Plan, task: Prepared, changes: Changes) -> Tensor:
    return edge.scored(made, changes.clean, changes)


def _at_both(made: Plan, task: Prepared, changes: Changes) -> Tensor:
    both = (changes.clean, made.record(task, side=1))
    return sum(edge.scored(made, one, changes) for one in both) / 2


def _on_the_way(points: Tensor, made: Plan, task: Prepared, changes: Changes) -> Tensor:
    """All embeddings on the way, for all edges."""
    embed = made.wired.embed
    return sum(edge.scored(made, made.record(task, shift={embed: point * changes.shift[embed]}), changes)
               for point in points.tolist()) / len(points)


def _one_by_one(points: Tensor, made: Plan, task: Prepared, changes: Changes) -> Tensor:
    """What one tap's sources give on the way, for the edges that leave them."""
    total = 0.0
    for tap in made.wired.sources:
        for point in points.tolist():
            moved = {tap: point * changes.shift[tap]}
            total = total + edge.scored(made, made.record(task, shift=moved), changes, only=tap)
    return total / len(points)


def _points(steps: int | Sequence[float], *, first: int) -> Tensor:
    if isinstance(steps, int) and steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if isinstance(steps, int):
        return torch.arange(first, steps + first, dtype=torch.float64) / steps
    points = torch.tensor(list(steps), dtype=torch.float64)
    if not len(points) or float(points.min()) < 0 or float(points.max()) > 1:
        raise ValueError(f"places on the way are from 0 (clean) to 1 (corrupted), not {list(steps)}")
    return points


__all__ = ["ALONG", "RULES", "STEPS", "atp", "clean_corrupted", "eap", "eap_ig", "gim", "relp", "rule_set"]
