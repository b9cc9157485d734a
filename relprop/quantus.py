"""Every method of relprop as a Quantus `explain_func`: arrays in, arrays out.

    >>> import numpy, torch
    >>> from relprop import quantus
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 3))
    >>> x = numpy.random.randn(2, 4).astype("float32")
    >>> quantus.explain(model, x, numpy.array([2, 0]), method="cp-lrp").shape
    (2, 4)

As in `quantus.MaxSensitivity()(model, x, y, explain_func=relprop.quantus.explain, explain_func_kwargs={"method":
"cp-lrp"}, ...)`. Quantus itself is imported nowhere here.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .composite import Composite
from .explain import explain as explained
from .subject import Subject

if TYPE_CHECKING:
    from numpy import ndarray


def explain(model: nn.Module | Subject, inputs: ndarray | Tensor, targets: ndarray | Tensor | int | None = None, *,
            method: str | Composite | None = None, options: dict[str, Any] | None = None, spread_bias: bool = False,
            unruled: str = "error", batch_size: int | None = None, channels: bool = False,
            device: str | torch.device | None = None) -> ndarray:
    """Relevance of a batch, in the shape that Quantus' metrics expect.

    Args: model: any module, in eval mode or not, or a `Subject`; it stays where it is, in its own dtype. inputs: pixels
        (B, C, Y, X) as the model takes them, token ids (B, T), or any tensor (B, ...). targets: index of the class, one
        a row or one for all; None: the prediction. method, options, spread_bias, unruled, batch_size: as of
        `relprop.explain`. channels: keep those of pixels, as metrics want that perturb each entry for itself
        (`FaithfulnessCorrelation` of Quantus 0.6). device: Quantus passes its own on; the inputs go to the model's.
    Returns: float32; (B, 1, Y, X) for pixels, summed over channels, or (B, C, Y, X); (B, T) for ids; else the shape of
        the inputs, or of the map where a method has no finer relevance.
    Raises: as `relprop.explain`; ValueError for channels of a method that does not tell them apart.
    """
    inputs = torch.as_tensor(inputs)
    spec = targets if targets is None or isinstance(targets, int) else torch.as_tensor(targets).flatten().tolist()
    found = explained(model, inputs, spec, method=method, options=options, spread_bias=spread_bias, unruled=unruled,
                      batch_size=batch_size)
    whole = next(iter(found.inputs.values()), None)
    finer = whole is not None and whole.shape == inputs.shape
    if channels and not finer:
        raise ValueError(f"{found.method} has a map {tuple(found.map.shape)} and nothing finer of an input "
                         f"{tuple(inputs.shape)}; leave channels out")
    if inputs.ndim == 4 and not channels:
        return found.map[:, None].numpy()
    return (whole.float() if finer else found.map).numpy()
