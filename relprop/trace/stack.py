"""The stacks of layers in a model, by how it is put together: nothing is run."""

from collections.abc import Iterator

from torch import nn

MOST = 0.6
"""A layer that holds more of its parameters than this in a list of equal ones is no layer, but a stage of them."""


def layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model, in order: what its lists of modules hold, each with a norm and matrices of its own; of
    stages, the layers in them. Where nothing holds a norm, the modules of lists of equal ones.

    Raises: ValueError if there are none.
    """
    found = list(dict.fromkeys(_layers(model))) or list(dict.fromkeys(_equal(model)))
    if not found:
        raise ValueError("no stack of layers was found to run again, no nn.ModuleList or nn.Sequential of modules with "
                         "matrices of their own; explain this model without checkpoint, a few rows at a time")
    return found


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    listed = isinstance(module, (nn.ModuleList, nn.Sequential))
    for child in module.children():
        if listed and _block(child) and not _stage(child):
            yield child
        else:
            yield from _layers(child)


def _block(module: nn.Module) -> bool:
    """Whether a module holds a norm, which has one number a feature, and matrices."""
    sizes = [[p.dim() for p in one.parameters(recurse=False)] for one in module.modules()]
    norms = any(dims and max(dims) == 1 for dims in sizes)
    return bool(module._modules) and norms and any(max(dims, default=0) > 1 for dims in sizes)


def _stage(module: nn.Module) -> bool:
    """Whether most of a module is layers of its own: lists of equal blocks."""
    inside = {p for one in module.modules() if isinstance(one, (nn.ModuleList, nn.Sequential)) and len(one) > 1
              and len({type(child) for child in one}) == 1 and all(map(_block, one)) for p in one.parameters()}
    whole = sum(p.numel() for p in module.parameters())
    return sum(p.numel() for p in inside) > MOST * whole


def _equal(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of the outermost lists of equal ones with matrices."""
    for child in model.children():
        several = isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) > 1
        if several and len({type(one) for one in child}) == 1 and all(one._modules for one in child):
            yield from child
        else:
            yield from _equal(child)
