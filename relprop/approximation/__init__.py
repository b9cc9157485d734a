"""Estimates of indirect effects: of every mediator of a model, from one or a few passes.

The exact indirect effect of a mediator takes a run of its own. To first order it is the change of its value times what
the outcome changes by per unit of it, sum_i (a'_i - a_i) g_i, with a on the base and a' on the counterfactual; all g
come from one backward pass. What g is, is the method:

- "attribution": the gradient at the base, attribution patching (Nanda 2023; Kramar et al. 2024, AtP*, eq. 4);
- "relevance": relevance per unit under the rules of a composite, relevance patching. Those of `finite`, the default,
  are the gradient's, and add what the finite change of each mediator does to the scale of the norms that read it
  (`ops.norm.finite`); those of `relp` are the published ones (Jafari et al. 2025, RelP, eq. 3);
- "integrated-gradients": the mean gradient on the way from one run to the other (Sundararajan et al. 2017; Hanna et
  al. 2024, EAP-IG): of the inputs, or of each mediator in turn.

Which to take: of one neuron or head the change is small beside the outcome, and the gradient nearly right; what it
loses, it loses at the norms, for beside the stream at its own position the change is not small. RelP holds the norms,
and is no first-order estimate. Spearman with the exact effects of 500 random neurons, on log-odds, ratio and difference
of two words' probabilities, mean of three draws (`tests/bench/estimates.py --ranks`):

                              attribution         relevance, finite   relevance, relp
    stories260k, girl or boy  0.953, 0.957, 0.935 0.988, 0.988, 0.988 0.20, 0.22, 0.26
    tasks-gpt2, who gives     0.953, 0.975, 0.984 0.976, 0.991, 0.993 0.76, 0.62, 0.87
    tasks-gpt2, professions   0.995, 1.000, 1.000 0.997, 0.997, 1.000 0.46, 0.70, 0.55

The one that is behind, of ratios, is so by one neuron, whose write is a sixth of the stream and to which later layers
add half as much again: at norms the write itself is counted, what layers answer to it at first order.

Of the heads of stories260k the three are 0.66 to 0.68, 0.86 to 0.95 and 0.46 to 0.60; of those of tasks-gpt2 the first
two are within 0.003 of each other, and RelP is below. A pass by `finite` takes 2.0 forward and backward passes of a
GPT-2 small for all 36,864 neurons. Norms that a model computes outside of a module of their own, layer scales behind a
part and attention patterns are left at first order.

Whole layers change much, and the gradient may saturate: there "integrated-gradients" does better, `along` mediators
best.

    >>> import torch, transformers
    >>> config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=9, n_positions=8)
    >>> model = transformers.GPT2LMHeadModel(config).eval()
    >>> base, other = ({"input_ids": torch.tensor([ids])} for ids in ([1, 2, 3], [1, 4, 3]))
    >>> found = estimates(model, base, other, lambda output: output.logits[:, -1, 7], at="L*.mlp.N*")
    >>> found.values.shape, found.address(33)
    (torch.Size([1, 64]), 'L1.mlp.N1')

References: N. Nanda, "Attribution patching: activation patching at industrial scale", 2023; J. Kramar et al., "AtP*: an
efficient and scalable method for localizing LLM behaviour to components", 2024; F. Jafari et al., "RelP: faithful and
efficient circuit discovery in language models via relevance patching", 2025; M. Hanna et al., "Have faith in
faithfulness: going beyond circuit overlap when finding model mechanisms", 2024; M. Sundararajan et al., "Axiomatic
attribution for deep networks", 2017.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ..address import Spans
from ..anatomy import Anatomy
from ..composite import NOT, Composite, get, gradient
from ..intervene import Places, Site, parts
from ..ops import activation, linear, matmul, mul, norm, softmax
from ..still import settled
from ..subject import Subject
from .agreement import Agreement, Estimates, agreement
from .norms import Stations, stations
from .place import Place
from .run import Query, Run

METHODS = ("attribution", "relevance", "integrated-gradients")
ALONG = ("inputs", "mediators")
STEPS = 10  # of integrated gradients

At = str | Site | Sequence[str | Site]
Outcome = Callable[[Sequence[Tensor]], Tensor]


def relp(*, hold_attention: bool = False) -> Composite:
    """The rules of RelP (Jafari et al. 2025): norms' scale held, activations passed, half to each factor of a gated
    product, the gradient elsewhere. Not conservative. Args: hold_attention: hold attention patterns, too ("AH").
    """
    return Composite("relp", NOT, {
        "linear": linear.zero, "conv": linear.zero, "norm": norm.held, "activation": activation.identity,
        "mul": mul.uniform, "matmul": matmul.gradient, "softmax": softmax.hold if hold_attention else softmax.taylor})


def finite() -> Composite:
    """Rules of relevance patching that are exact to first order, and at norms beyond it: the gradient of every op, and
    at the norms that read what a mediator writes the finite change of it (`ops.norm.finite`). Not conservative.
    """
    return gradient().but("finite", rules={"norm": norm.finite})


def estimates(subject: Subject | nn.Module, base: object, counterfactual: object, outcome: object = None, *,
              at: At, method: str = "attribution", composite: str | Composite | None = None,
              steps: int | Sequence[float] = STEPS, along: str = "inputs", align: Tensor | None = None,
              spans: Spans | None = None, batch_size: int = 32, known: Anatomy | None = None) -> Estimates:
    """Estimated indirect effect of every mediator that `at` means, on a target.

    Cost: a forward pass on the counterfactual, a forward and a backward on the base, and of one row one for the
    anatomy; under `finite` one more of one row, and two products with the weights that each part writes by. Integrated
    gradients take a forward on the base and `steps` times forward and backward, along mediators that for each tap.

    Args: base, counterfactual: inputs of as many rows, as `Subject.prepare` takes them; a counterfactual of None puts
            zeros. outcome: a target, as `explain` takes it; the prediction is that of the base.
        at: sites or patterns of sites: "L*.attn.H*", "L*.mlp.N*@-1", "L3", "embed", "L*.attn.H*.pattern", "L*.mlp[*]".
        method: of `METHODS`. composite: rules of the relevance; `finite` where it is not given. steps: points of
            integrated gradients, Gauss-Legendre, or the points themselves, from 0 (base) to 1, of equal weight.
        along: "inputs", one way for all mediators, or "mediators", each from its own value to its other one, all else
            as on the base: then a sum over the entries and positions of a tap is the exact effect of all of it.
        align: as of `Query`. spans: positions by name, for sites such as "L3@profession". batch_size: rows at once.
        known: the model's anatomy, where it is there already.
    Raises: ValueError for an unknown method, place or position, for inputs of different length without `align`, and as
        of `propagate`.
    """
    if not isinstance(subject, Subject):
        subject = Subject.from_module(subject)
    batch = subject.prepare(base)
    other = None if counterfactual is None else subject.prepare(counterfactual)
    targets = subject.targets(outcome, batch.rows)
    if any(target.left_open for target in targets.targets):  # a prediction must be the same one in every run
        with torch.no_grad(), settled(subject.model):
            targets = targets.fixed(subject.forward(batch), batch)
    read = lambda of: lambda output, index: targets.take(index).value(output, of.take(index))
    query = Query(batch, other, read(batch), align, there=None if other is None else read(other))
    return estimated(subject.model, [query], at=at, method=method, composite=composite, steps=steps, along=along,
                     spans=spans, batch_size=batch_size, known=known)


def estimated(model: nn.Module, queries: Sequence[Query], outcome: Outcome | None = None, *, at: At,
              method: str = "attribution", composite: str | Composite | None = None,
              steps: int | Sequence[float] = STEPS, along: str = "inputs", prompt_only: bool = False,
              spans: Spans | None = None, batch_size: int = 32, known: Anatomy | None = None) -> Estimates:
    """`estimates` of an outcome that is made of the answers to one or more queries of as many rows.

    Args: outcome: of each row, (R,), from the answers in order; None: the answer to the one query, (R,).
        prompt_only: change the positions of the prompt alone, of attention patterns rows and columns.
    """
    if method not in METHODS or along not in ALONG:
        raise ValueError(f"a method is one of {', '.join(METHODS)}, along {' or '.join(ALONG)}; not {method!r} and "
                         f"{along!r}")
    _check_rows(queries)
    wanted = [at] if isinstance(at, (str, Site)) else list(at)
    integrated, rules, points = method == "integrated-gradients", get(composite or finite()), _points(steps)
    found = []
    with _still(model):
        first = queries[0].base.take([0])
        if known is None:
            known = parts(model, first.args, first.kwargs)
        norms: Stations | None = None
        for index in torch.arange(queries[0].base.rows).split(max(1, batch_size)):
            places = Places.of(model, _of_rows(spans, index))
            run = Run(model, known, [query.take(index) for query in queries], outcome or (lambda answers: answers[0]),
                      wanted, positions=places, moved=integrated and along == "inputs")
            if method == "relevance" and norms is None:
                norms = stations(model, first.args, first.kwargs, run.taps, rules)
            slopes = {"attribution": run.gradients, "relevance": partial(run.relevances, rules, norms),
                      "integrated-gradients": partial(run.integrated, *points)}[method]()
            found.append((run.scored(slopes, prompt_only), *run.outcomes()))
    return Estimates(method, *(torch.cat(parts) for parts in zip(*found)), run.places)


def _check_rows(queries: Sequence[Query]) -> None:
    if not queries:
        raise ValueError("an outcome of no query")
    counts = {batch.rows for query in queries for batch in (query.base, query.counterfactual) if batch is not None}
    if len(counts) != 1:
        raise ValueError(f"base and counterfactual of as many rows are expected, in every query; there are "
                         f"{', '.join(map(str, sorted(counts)))}")


def _of_rows(spans: Spans | None, index: Tensor) -> Spans | None:
    """The spans, those that each row has its own of for these rows."""
    each = lambda span: not isinstance(span, int) and len(span) > 0 and not isinstance(span[0], int)
    return spans and {name: [span[row] for row in index.tolist()] if each(span) else span
                      for name, span in spans.items()}


def _points(steps: int | Sequence[float]) -> tuple[Tensor, Tensor]:
    """Points of (0, 1) and their weights."""
    if isinstance(steps, int):
        import numpy as np

        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        return torch.tensor((nodes + 1) / 2), torch.tensor(weights / 2)
    points = torch.tensor(list(steps), dtype=torch.float64)
    if not len(points) or float(points.min()) < 0 or float(points.max()) > 1:
        raise ValueError(f"points of integrated gradients are from 0 (base) to 1 (counterfactual), not {list(steps)}")
    return points, torch.full_like(points, 1 / len(points))


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for one in (settled(model), torch.inference_mode(False), torch.enable_grad()):
            stack.enter_context(one)
        yield


__all__ = ["ALONG", "METHODS", "STEPS", "Agreement", "Estimates", "Place", "Query", "agreement", "estimated",
           "estimates", "finite", "relp"]
