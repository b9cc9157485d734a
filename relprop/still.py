"""A model held still while it is explained: evaluation mode, frozen parameters, and all given back afterwards."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from .kernel import replaced


@contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode with frozen parameters, and without kernels that no rule can follow (see `kernel`);
    every mode, every `requires_grad` and every kernel comes back.

    One by one, since a model may be in train mode in parts, and also after an exception.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    >>> with settled(model):
    ...     model.training, model[0].weight.requires_grad
    (False, False)
    >>> model[1].training, model[0].weight.requires_grad
    (True, True)
    """
    modes = [(module, module.training) for module in model.modules()]
    # by name: accelerate puts another parameter in the place of one that it keeps elsewhere until it is used
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    try:
        _switch((module, False) for module, _ in modes)
        _require(model, dict.fromkeys(wanted, False))
        with replaced(model):
            yield
    finally:
        _switch(modes)
        _require(model, wanted)


def _switch(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        if module.training != training:  # asked first: to set it takes a module several times as long
            module.training = training


def _require(model: nn.Module, wanted: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in wanted and parameter.requires_grad != wanted[name]:
            parameter.requires_grad_(wanted[name])
