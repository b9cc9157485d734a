"""Which modules of a model are its layers: those of its innermost stacks, along the residual stream."""
from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from ..trace.survey import Run
from .flow import Flow

Stack = tuple[str, list[str]]
"""The path of a container, and those of the modules in it that hold what makes them layers."""


def inside(path: str, owner: str) -> bool:
    """Whether a module is another one, or in it."""
    return path == owner or path.startswith(f"{owner}.")


def stacks(model: nn.Module, flow: Flow, complete: Callable[[Run], bool]) -> list[list[str]]:
    """The paths of the layers, stack by stack: of modules that hold an attention each, or, where a model has none, of
    modules that add to the stream that they read.

    Args: complete: whether a run of a module is a whole layer, with an MLP beside its attention. A list of modules that
        are not is of the parts of one layer (T5), if that is in a list as well.
    """
    runs = {run.path: run for run in reversed(flow.survey.runs)}  # the first of each
    attended = [event.path for event in flow.survey.seen if event.kind == "attention"]
    holds = lambda path: any(inside(where, path) for where in attended)
    found = [*_lists(model, holds), *_pairs(model, lambda path: holds(path) and path in runs and complete(runs[path])
                                            and bool(flow.branches(runs[path])))]
    if found:
        layers = [one for one in found if any(path in runs and complete(runs[path]) for path in one[1])]
        whole = [one for one in found if one in layers or not any(_within(one[0], other) for other in layers)]
        return [_beside(model, name, paths, runs, flow) for name, paths in _innermost(whole)]
    adding = lambda path: path in runs and bool(flow.branches(runs[path]))
    return [_beside(model, name, paths, runs, flow) for name, paths in _innermost(list(_lists(model, adding)))]


def _lists(model: nn.Module, holds: Callable[[str], bool]) -> Iterator[Stack]:
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            paths = [path for path in _children(name, module) if holds(path)]
            if paths:
                yield name, paths


def _pairs(model: nn.Module, whole: Callable[[str], bool]) -> Iterator[Stack]:
    """Modules of which several that they hold, in no list, are layers by themselves."""
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            paths = [path for path in _children(name, module) if whole(path)]
            if len(paths) > 1:
                yield name, paths


def _children(name: str, module: nn.Module) -> list[str]:
    return [f"{name}.{child}" if name else child for child, _ in module.named_children()]


def _within(name: str, stack: Stack) -> bool:
    return stack[0] != name and any(inside(name, path) for path in stack[1])


def _innermost(found: list[Stack]) -> list[Stack]:
    return [one for one in found if not any(_within(name, one) for name, _ in found)]


def _beside(model: nn.Module, name: str, paths: list[str], runs: dict[str, Run], flow: Flow) -> list[str]:
    """The layers of a stack, and with them those that do without: of the same kind of module, or on the same stream."""
    kinds = {type(model.get_submodule(path)) for path in paths}
    container = model.get_submodule(name)
    return [path for path in _children(name, container) if path in paths or (path in runs and (
        type(model.get_submodule(path)) in kinds - {nn.Sequential} or bool(flow.branches(runs[path]))))]


__all__ = ["inside", "stacks"]
