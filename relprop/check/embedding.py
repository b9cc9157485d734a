"""The table of vectors that a model looks its tokens up in, and more vectors in it for a while."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..still import settled
from ..subject import Subject
from ..tokens import Batch


@contextmanager
def extended(table: nn.Module, vectors: Tensor) -> Iterator[None]:
    """The embedding with more vectors (N, D) behind its own; a weight that other modules share stays theirs."""
    weight = table.weight
    try:
        table.weight = nn.Parameter(torch.cat([weight.detach(), vectors.to(weight)]), requires_grad=False)
        yield
    finally:
        table.weight = weight


def looked_up(subject: Subject, batch: Batch, ids: Tensor) -> nn.Module:
    """The first module with a table of vectors that is called with the token ids.

    Raises: ValueError if there is none.
    """
    found: list[nn.Module] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        given = [one for one in [*args, *kwargs.values()] if isinstance(one, Tensor) and one.shape == ids.shape]
        holds = isinstance(module._parameters.get("weight"), nn.Parameter) and module.weight.ndim == 2
        if holds and any(torch.equal(one, ids) for one in given):
            found.append(module)

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in subject.model.modules()]
    try:
        with settled(subject.model), torch.no_grad():
            subject.forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError(f"no module of {subject.name} looks the token ids up in a table, so that there are no "
                         "embeddings to change")
    return found[0]
