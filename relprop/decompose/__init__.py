"""What a part of the input or of the model makes up of what the model says: contextual decomposition.

    >>> import relprop
    >>> d = relprop.decompose("reviews-bert", "A wonderful film.", "tokens", target="POSITIVE")
    >>> bool((d.rel + d.irrel == d.total).all()), len(d.sources)
    (True, 6)

Every value x is split into x = rel + irrel. At a source rel is what stands there less what an ablation would put there,
elsewhere both parts go on through the model by the rules of a division; only rel is carried, for many sources at once.

References: Hsu et al. 2024 (Efficient automated circuit discovery in transformers using contextual decomposition,
"CD-T", ICLR 2025); Murdoch et al. 2018 (Beyond word importance: contextual decomposition to extract interactions from
LSTMs).
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import division
from ..address import Address, Spans
from ..asked import Asked
from ..division import Division
from ..intervene import Intervention, Mean, Resample, Zero
from ..load import load
from ..posed import posed
from ..result.decomposition import Decomposition, Part
from ..still import settled
from ..subject import Subject
from ..target import Targets
from ..tokens import Batch
from .importance import METHODS
from .place import Place, Placing
from .run import Found, Run
from .source import KINDS, Source, sources

__all__ = ["KINDS", "METHODS", "Decomposition", "Found", "Part", "Place", "Placing", "Run", "Source",
           "decompose", "intervention", "sources"]

ABLATIONS = ("zero", "mean", "resample")

Written = str | Address | Sequence[Any] | Mapping[str, Any]


def decompose(subject: str | Subject | nn.Module | tuple, inputs: object, source: Written, *, target: object = None,
              at: str | Sequence[str] = (), ablation: str | Intervention = "zero", reference: object = None,
              rules: str | Division = "cdt", spans: Spans | None = None, unruled: str = "error",
              chunk: int | None = None) -> Decomposition:
    """How much of a target, and of values inside the model, each source makes up: total = rel + irrel.

    Args:
        subject, inputs, target: as of `relprop.explain`.
        source: an address or a pattern, "L2.attn.H1@5", "L*.mlp", each place by itself; a list of these; a list of
            lists, or a mapping from names, for places that are decomposed together; or "tokens", "words", "patches" of
            the input (at the stream before the first layer), "heads", "heads at positions" or "mlps".
        at: addresses whose relevant parts are wanted. Of `L5.attn.H3.q`, `.k` and `.v`, the vectors themselves.
        ablation: what is irrelevant at a source: "zero", nothing; "mean", the mean at its position over `reference`;
            "resample", its value for `reference`; or an intervention of `relprop.intervene`.
        reference: inputs, as many rows as these, or one, for "resample".
        rules: "cdt" (the published rule for GPT-2), "cdt-held" (for BERT), "difference", "shapley", or a `Division`.
        spans: positions by name. unruled: "difference" splits an op without a rule by what its output loses. chunk:
            sources x rows that are carried at once; None: as there is room for.
    Returns: a `Decomposition`; rel + irrel is the model's own total, whatever the rules.
    Raises: ValueError or TypeError for what cannot be asked; UnruledOp for an op that is not in the table.
    """
    rules = division.get(rules)
    if unruled not in ("error", "difference"):
        raise ValueError(f"unruled must be 'error' or 'difference', got {unruled!r}")
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise ValueError(f"chunk must be a whole number of at least 1, or None, got {chunk!r}")
    subject = subject if isinstance(subject, Subject) else load(subject)
    batch = subject.prepare(inputs)
    batch, targets = posed(subject, batch, subject.targets(target, batch.rows))
    if batch.layout is not None:
        raise ValueError("what is made up of two answers, or of the similarity of two texts, is asked one by one; give "
                         "one Answer, or Similarity(to=...)")
    one = intervention(ablation, None if reference is None else subject.prepare(reference))
    run = Run(subject.model, batch.args, batch.kwargs, rules, one, spans, unruled, chunk)
    found = sources(run.placing, source, batch)
    looks = dict(place for text in ((at,) if isinstance(at, str) else at) for place in run.placing.places(text))
    asked = fixed(subject, batch, targets)
    parts = run.of(found, asked, looks)
    if not bool(parts.total.isfinite().all() and parts.rel.isfinite().all()):
        subject.check_weights()
        raise ValueError(f"the target, {asked.names[0]}, or what a source makes up of it is NaN or infinite, though "
                         "the weights are finite; try a wider dtype")
    return Decomposition(tuple(one.name for one in found), parts.rel.cpu(), parts.total.cpu(), asked.names, parts.at,
                         rules.name, type(one).__name__.lower(), run.forwards + len(found) + 2, about(subject, rules))


def intervention(ablation: str | Intervention, reference: Batch | None) -> Intervention:
    """What is put at a source to say what is irrelevant there, by its name.

    Raises: ValueError for an unknown name, a reference that is missing, or one that is not asked for.
    """
    if isinstance(ablation, Intervention):
        return ablation
    if ablation not in ABLATIONS:
        raise ValueError(f"unknown ablation {ablation!r}; there are {', '.join(ABLATIONS)}, and those of "
                         "relprop.intervene")
    if (reference is None) != (ablation == "zero"):
        raise ValueError(f"ablation {ablation!r} {'needs' if reference is None else 'takes no'} reference inputs; give "
                         "reference= with ablation='mean' or 'resample'")
    return {"zero": Zero, "mean": lambda: Mean(reference, per_position=True),
            "resample": lambda: Resample(reference)}[ablation]()


def fixed(subject: Subject, batch: Batch, targets: Targets) -> Asked:
    """The targets, what is the prediction looked up. Cost: a forward pass."""
    asked = Asked(targets, batch)
    with torch.no_grad(), settled(subject.model):
        asked(subject.forward(batch))
    return asked


def about(subject: Subject, rules: Division) -> dict[str, Any]:
    """The provenance of a decomposition."""
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"model": subject.name, "rules": rules.describe(), "dtype": str(subject.dtype).removeprefix("torch."),
            "versions": versions}
