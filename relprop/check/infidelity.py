"""Infidelity: how well a map, as a linear model, predicts what taking units out does to the target. Captum's.

Reference: C.-K. Yeh et al., "On the (In)fidelity and Sensitivity of Explanations", NeurIPS 2019.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .. import units
from ..still import settled
from . import statistics
from .perturbation import VALUE, Readout
from .removal import Removal, chance

SHARE = 0.2  # of the units that go at once


def infidelity(readout: Readout, removal: Removal, relevance: Tensor, *, samples: int = 20, seed: int = 0) -> Tensor:
    """Squared error of the map's prediction of what is lost with random sets of units. Lower is better.

    INFD = E_I [(I . b R - (f(x) - f(x - I)))^2] (Yeh et al. 2019, eq. 1), by Captum's `infidelity`, R the relevance of
    the units and I the set, in which each unit is with a chance of one in five, and at least one is. The map is given
    its best scale b >= 0, so that maps without a unit, such as attention, compare. (Captum's `normalize` takes a
    negative b as well, which calls a map right that has every sign wrong.) A map that predicts nothing, or the
    opposite, gets the mean square of the losses. Cost a row: `samples` + 1 forwards.

    Args: relevance: (B, T) or (B, Y, X). samples: sets a row, at least 2; they depend on the seed and the row only.
    Returns: (B,), squared unit of the target.
    Raises: ValueError for a map that does not fit; Undefined for one that says nothing.
    """
    from captum.metrics import infidelity as captum

    if relevance.shape != removal.groups.shape:
        raise ValueError(f"a map of shape {tuple(relevance.shape)} does not fit an input of "
                         f"{tuple(removal.groups.shape)}")
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}")
    pooled = units.pooled(relevance.detach().cpu().double(), removal.groups)  # (B, U)
    for row, count in enumerate(removal.counts.tolist()):
        statistics.told(pooled[row, :count])
    gone = _sets(readout, removal, samples, seed)  # (B, S, U)
    whole, left = _read(readout, removal, torch.zeros_like(gone[:, :1]))[:, 0], _read(readout, removal, gone)
    predicted, lost = (gone.double() @ pooled[..., None])[..., 0], whole[:, None] - left  # (B, S)
    scale = (predicted * lost).sum(1).clamp(min=0) / predicted.square().sum(1).clamp(min=torch.finfo().tiny)

    def changed(present: Tensor) -> tuple[Tensor, Tensor]:
        return gone.flatten(0, 1).double(), present - gone.flatten(0, 1).double()

    def value(present: Tensor) -> Tensor:
        return whole if len(present) == len(whole) else left.flatten()

    with torch.no_grad():
        return captum(value, changed, torch.ones_like(pooled), pooled * scale[:, None], n_perturb_samples=samples)


def _sets(readout: Readout, removal: Removal, samples: int, seed: int) -> Tensor:
    """Units that go, bool (B, samples, U), of a row's own; by another chance (seed + 1) than random maps are."""
    drawn = torch.zeros(readout.batch.rows, samples, int(removal.counts.max()), dtype=torch.bool)
    for row, count in enumerate(removal.counts.tolist()):
        noise = torch.rand(samples, count, generator=chance(readout.batch, removal.groups, row, seed + 1))
        drawn[row, :, :count] = (noise < SHARE) | (noise == noise.amin(1, keepdim=True))
    return drawn


def _read(readout: Readout, removal: Removal, gone: Tensor) -> Tensor:
    """The target without sets of units, (B, S, U) to (B, S)."""
    device, flat = readout.subject.device, gone.flatten(0, 1)
    which = torch.arange(len(gone)).repeat_interleave(gone.shape[1])
    with settled(readout.subject.model), torch.no_grad():
        parts = [readout.read(removal.without(which[at].to(device), flat[at].to(device)), which[at])[:, VALUE]
                 for at in torch.arange(len(flat)).split(readout.batch_size)]
    return torch.cat(parts).view(gone.shape[:2])
