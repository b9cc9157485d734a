"""Local importance by contextual decomposition: what each token or patch makes up of a contrast of two classes.

Reference: Hsu et al. 2024 (CD-T, section 4.3 and their code `comp_cd_scores_level_skip`).
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import division, units
from ..asked import Asked
from ..division import Division
from ..errors import IndependentOutput
from ..result import Relevance
from ..run import independent
from ..still import settled
from ..subject import Subject
from ..target import Choice, Contrast, Reading, Targets
from ..tokens import Batch
from .run import Run
from .source import Source, patches, pictured, split_input


def cdt(subject: Subject, batch: Batch, targets: Targets, *, rules: str | Division = "cdt-held", level: int = 0,
        skip: int = 1, contrast: bool = True, chunk: int | None = None) -> Relevance:
    """rel_label - rel_competitor of each token or patch by itself (Hsu et al. 2024, their code for BERT).

    The source is the stream before layer `level` at the unit's positions, zero the rest. Of a class or a token, the
    competitor is the one with the highest logit besides; other targets stand as they are. Not conservative: the parts
    of units by themselves do not sum to that of all. With clashing signs settled, as published, units that
    work against the target get next to nothing; rules that do not settle them, such as "shapley", show these, too.
    Cost: a forward pass with a shadow of as many rows as there are units, at about two plain forwards a unit.

    Args: level: the layer whose input is split; below it the model runs as it is. skip: tokens (or patches) that are
        taken together, side by side; their part is divided evenly. contrast: False: the target alone. chunk: units x
        rows carried at once; None: as there is room for.
    Raises: IndependentOutput where nothing is relevant; ValueError for a level that is not there, or where the stream
        has other positions than the input has units.
    """
    rules, asked = division.get(rules), Asked(targets, batch)
    if skip < 1:
        raise ValueError(f"skip must be at least 1, the units that are taken together, got {skip}")
    with torch.no_grad(), settled(subject.model):
        output = subject.forward(batch)
        asked(output)
        asked = Asked(_contrasted(asked, output), batch) if contrast else asked
    run = Run(subject.model, batch.args, batch.kwargs, rules, chunk=chunk)
    kind = "patches" if pictured(batch) else "tokens"
    found = split_input(run.placing, batch, kind, level=level)
    windows = [_window(found[start:start + skip]) for start in range(0, len(found), skip)]
    parts = run.of(windows, asked)
    scores = parts.rel.mT.repeat_interleave(skip, 1)[:, :len(found)]  # (B, U)
    idle = (scores == 0).all(1)
    if bool(idle.any()):
        raise IndependentOutput(independent(idle.nonzero().flatten().tolist(), batch.rows))
    return Relevance(
        map=_map(scores, batch, found[0].places[0].where.shape[1], skip),
        value=parts.total.float().cpu(), target=asked.names, method="cdt",
        conservation="not conservative", units=batch.units, ledger=None,
        forwards=run.forwards + len(windows) + 2, backwards=0, inputs={}, latents={},
        provenance={"model": subject.name, "rules": rules.describe(), "level": level, "skip": skip,
                    "contrast": contrast})


def _window(found: list[Source]) -> Source:
    """Neighbours taken together."""
    first = found[0].places[0]
    where = torch.stack([one.places[0].where for one in found]).any(0)
    return Source(" + ".join(one.name for one in found), (replace(first, where=where),))


def _contrasted(asked: Asked, output: object) -> Targets:
    """The targets, each class or token against the highest of the others."""
    found = list(asked.targets.targets)
    for row, target in enumerate(found):
        if isinstance(target, Choice):
            reading = Reading(output, asked.batch, asked.targets.vocabulary, torch.tensor([row]))
            z = target.choices(reading)[0].clone()
            z[target.column(reading)] = -torch.inf
            other = int(z.argmax())
            if bool(z[other].isfinite()):
                found[row] = Contrast(target, target.other(other))
    return replace(asked.targets, targets=tuple(found))


def _map(scores: Tensor, batch: Batch, length: int, skip: int) -> Tensor:
    """Scores of units, (B, U), as a map; what windows share is divided by how many units of the row they have."""
    shared = skip if scores.shape[1] % skip == 0 else torch.full((scores.shape[1],), skip).index_fill(
        0, torch.arange(scores.shape[1] - scores.shape[1] % skip, scores.shape[1]), scores.shape[1] % skip)
    scores = (scores / shared).float().cpu()
    if not pictured(batch):
        return F.pad(scores, (0, length - scores.shape[1]))  # padding of all rows
    return units.spread(scores, patches(batch, length)[0].expand(batch.rows, -1, -1))


METHODS: dict[str, Callable[..., Relevance]] = {"cdt": cdt}
