"""Sensitivity: how much a map changes when its input hardly does. Captum's.

Reference: C.-K. Yeh et al., "On the (In)fidelity and Sensitivity of Explanations", NeurIPS 2019.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import rows, units
from ..subject import Subject
from ..target import Targets
from ..tokens import Batch
from .embedding import extended, looked_up
from .removal import chance

RADIUS = 0.1  # in standard deviations of the row's own input

Explain = Callable[[Batch, Targets], Tensor]


def max_sensitivity(subject: Subject, batch: Batch, targets: Targets, explain: Explain, *, radius: float = RADIUS,
                    samples: int = 8, seed: int = 0, batch_size: int = 32) -> Tensor:
    """Largest relative change of the map over small random changes of the input. Lower is better.

    SENS = max_{|d| <= r} |R(x + d) - R(x)| / |R(x)| (Yeh et al. 2019, definition 1), by Captum's `sensitivity_max`, d
    uniform. For text d is added to the embeddings of the tokens: for the while of the call each token has a vector of
    its own behind those of the vocabulary. A method that draws its noise from the input itself is as sensitive as noise
    is. Cost a row: `samples` + 1 maps.

    Args: targets: fixed, so that the same thing is explained. explain: (batch, targets) -> maps, (B, ...). radius: r,
        in standard deviations of the row's own input. samples: changes a row, which depend on the seed and the row.
    Returns: (B,), 0 for a map that does not change; 1 says that the change is as large as the map.
    Raises: ValueError for token ids without an embedding table to add to.
    """
    from captum.metrics import sensitivity_max

    groups = units.groups(batch)
    start = _Start(subject, batch, groups)
    noise = torch.stack([_noise(start.values[row], chance(batch, groups, row, seed + 2), samples, radius)
                         for row in range(batch.rows)])  # (B, samples, ...)

    def changed(values: Tensor) -> Tensor:
        return values + noise.flatten(0, 1)

    def maps(given: Tensor | tuple[Tensor, ...]) -> tuple[Tensor]:  # Captum takes a tensor for its rows
        values = given if isinstance(given, Tensor) else given[0]
        which = torch.arange(batch.rows).repeat_interleave(len(values) // batch.rows)
        with torch.enable_grad():
            parts = [start.explained(values[at], which[at], targets, explain)
                     for at in torch.arange(len(values)).split(batch_size)]
        return (torch.cat(parts),)

    return sensitivity_max(maps, start.values, changed, n_perturb_samples=samples).double().cpu()


class _Start:
    """The values that are changed: the pixels, or the vectors of a text's own tokens. `values` is (B, ...)."""

    def __init__(self, subject: Subject, batch: Batch, groups: Tensor) -> None:
        self.batch, self.groups = batch, groups
        source = rows.leaf(batch)[1].detach()
        self.table = None if source.is_floating_point() else looked_up(subject, batch, source)
        self.values = source if self.table is None else self.table.weight.detach()[source]

    def explained(self, values: Tensor, which: Tensor, targets: Targets, explain: Explain) -> Tensor:
        """Maps of the rows `which`, with these values in place of theirs."""
        batch, own = self.batch.take(which), targets.take(which.tolist())
        if self.table is None:
            return explain(rows.put(batch, values), own)
        ids = rows.leaf(batch)[1]
        inside = self.groups[which].to(ids.device) >= 0
        fresh = len(self.table.weight) + torch.arange(int(inside.sum()), device=ids.device)
        with extended(self.table, values[inside]):
            return explain(rows.put(batch, ids.masked_scatter(inside, fresh.to(ids.dtype))), own)


def _noise(values: Tensor, generator: torch.Generator, samples: int, radius: float) -> Tensor:
    drawn = 2 * torch.rand(samples, *values.shape, generator=generator, dtype=torch.float64) - 1
    return (drawn.to(values) * (radius * values.double().std())).to(values)
