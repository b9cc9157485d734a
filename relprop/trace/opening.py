"""What is inside: the inner calls of torch's own Python functions, and the tensor that an output is about."""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def first(output: Any) -> Any:
    """The tensor that a module's output is about: itself, or the first of a tuple, list or model output."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return next((v for v in values if isinstance(v, Tensor)), None)


def _never(*_: Any) -> bool:
    return False


_BLIND = {"has_torch_function": _never, "has_torch_function_unary": _never, "has_torch_function_variadic": _never}


def opened(func: Any) -> Callable[..., Any] | None:
    """A Python function of torch with its own interception check off, so that the calls inside it are seen.

    PyTorch hands a function such as `F.normalize` over as one call, and looks no further; run with the check off,
    the same code makes its inner calls in the open. None for functions that are not written in Python.
    """
    if func is torch._assert:  # it asks torch.overrides itself, out of reach, and computes nothing
        return None
    if hasattr(func, "__wrapped__"):
        return func.__wrapped__
    code = getattr(func, "__code__", None)
    if code is None or not any(name in _BLIND for name in code.co_names):
        return None
    blind = {**func.__globals__, **_BLIND}
    blinded = types.FunctionType(code, blind, func.__name__, func.__defaults__, func.__closure__)
    blinded.__kwdefaults__ = func.__kwdefaults__
    return blinded
