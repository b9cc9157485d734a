"""A model held still while it is explained: evaluation mode, frozen parameters, and all given back afterwards."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode with frozen parameters; every mode and every `requires_grad` comes back.

    One by one, since a model may be in train mode in parts, and also after an exception.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    >>> with settled(model):
    ...     model.training, model[0].weight.requires_grad
    (False, False)
    >>> model[1].training, model[0].weight.requires_grad
    (True, True)
    """
    training = [module for module in model.modules() if module.training]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in wanted:
            parameter.requires_grad_(True)
