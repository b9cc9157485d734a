"""A model's forward pass under the rules of a composite, ready for the ways back.

What is explained (floating inputs, word embeddings), the explained value and the model's state are the same whatever is
asked of the pass: relevance of the inputs (`relevance`) or of attention patterns (`pattern`).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .composite import Composite
from .errors import IndependentOutput
from .family import unwrapped
from .ops.call import offered
from .ops.journal import Rows
from .still import settled
from .trace import STREAM, Interception, Way, checkpointed, intercepted

TOKEN_NAMES = ("input_ids", "decoder_input_ids")

Value = Callable[[Any], Tensor]
"""From a model's output to the explained values, (B,)."""


@dataclass
class Run:
    """One explanation as it is being made."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Value
    composite: Composite
    unruled: str = "error"
    way: Way | None = None
    positions: bool = False
    checkpoint: bool = False
    precision: torch.dtype = field(init=False)
    """Of the least precise part that the model computes in."""

    def __post_init__(self) -> None:
        self.model = unwrapped(self.model)
        self.model = unwrapped(self.model)
        self.args = tuple(_ordinary(a) for a in self.args)
        self.kwargs = {name: _ordinary(value) for name, value in self.kwargs.items()}
        name = next((name for name, p in self.model.named_parameters() if p.is_inference()), None)
        if name is not None:
            raise ValueError(f"the parameter {name!r} was made under torch.inference_mode(), and no gradient passes "
                             "such a tensor; make or load the model outside of it")
        tensors = [t for t in (*self.args, *self.kwargs.values()) if isinstance(t, Tensor)]
        if not tensors:
            raise ValueError("nothing to explain: no tensor among the inputs")
        explained = [t for name, t in self._inputs() if t.is_floating_point()]
        self.rows = self._counted(explained or tensors)
        parameter = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        self.dtype = explained[0].dtype if explained else torch.float32 if parameter is None else parameter.dtype
        self.precision = self.dtype

    def _counted(self, explained: list[Tensor]) -> int:
        """Number of rows: as what is asked says, else that of the explained inputs, of which patches or tiles of all
        pictures, one after the other, are more than there are rows.
        """
        batch = getattr(self.value, "batch", None)
        if batch is not None:
            return batch.runs
        ids = [t for name, t in self._inputs() if name in TOKEN_NAMES]
        return min(t.shape[0] for t in ([*ids, *explained] if ids else explained[:1]))

    @property
    def apart(self) -> bool:
        """Whether the rows are explained one at a time: where patches or tiles of all pictures lie one after the other,
        the model treats them as one row, and then one picture after the other.
        """
        pictures = getattr(getattr(self.value, "batch", None), "pictures", None)
        return pictures is not None and self.rows > 1 and bool(pictures.packing)

    def _inputs(self) -> Iterator[tuple[str, Tensor]]:
        named = [*((str(i), t) for i, t in enumerate(self.args)), *self.kwargs.items()]
        return ((name, t) for name, t in named if isinstance(t, Tensor) and "mask" not in name)

    def of_row(self, row: int) -> Self:
        """The same run on one row of the batch."""
        def cut(t: Any) -> Any:
            return t[row:row + 1] if isinstance(t, Tensor) and t.dim() and t.shape[0] == self.rows else t

        value, rows = self.value, self.rows
        one = getattr(value, "row", None)
        value = one(row, rows) if one else value
        batch = getattr(value, "batch", None)
        if batch is not None and batch.pictures is not None:  # which knows whose each patch or tile is
            return replace(self, args=batch.args, kwargs=batch.kwargs, value=value)
        return replace(self, args=tuple(cut(a) for a in self.args), kwargs={k: cut(v) for k, v in self.kwargs.items()},
                       value=value)

    @contextmanager
    def ran(self, rows: Rows, **options: Any) -> Iterator[tuple[Interception, dict[str, Tensor], Any]]:
        """The forward pass under the rules, in a `with` block for the ways back: the interception, the leaves by name
        and the output. Options as of `intercepted`.
        """
        with ExitStack() as stack:
            stack.enter_context(settled(self.model))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            # what a checkpoint recomputes must meet the interception, which lives in this thread
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            leaves, args, kwargs = self._leaves()
            mode = stack.enter_context(intercepted(
                self.model, self.composite, token_ids=self._token_ids(), unruled=self.unruled, precision=self.dtype,
                rows=rows, way=self.way, positions=self.positions, **options))
            if self.checkpoint:
                stack.enter_context(checkpointed(mode, self.model))
            output = self.model(*args, **kwargs)
            yield mode, {**leaves, **mode.leaves}, output

    def _leaves(self) -> tuple[dict[str, Tensor], tuple[Any, ...], dict[str, Any]]:
        """The floating inputs as leaves, and the arguments that carry them into the model."""
        leaves = {name: t.detach().clone().requires_grad_() for name, t in self._inputs() if t.is_floating_point()}

        def carried(name: str, value: Any) -> Any:
            if name not in leaves:
                return value
            carrier = offered(leaves[name])
            carrier._relprop_input = True
            setattr(carrier, STREAM, name)
            return carrier

        args = tuple(carried(str(i), a) for i, a in enumerate(self.args))
        return leaves, args, {name: carried(name, v) for name, v in self.kwargs.items()}

    def _token_ids(self) -> dict[str, Tensor]:
        whole = {name: t for name, t in self._inputs() if not t.is_floating_point() and t.dtype != torch.bool}
        named = {name: t for name, t in whole.items() if name in TOKEN_NAMES}
        return named or {name: t for name, t in whole.items() if name.isdigit()}

    @property
    def ruled(self) -> bool:
        """Whether the explained value is computed under the rules, as if the model did it."""
        return getattr(self.value, "ruled", False)

    def asked(self, output: Any) -> Tensor:
        with torch._C._EnableTorchFunction() if self.ruled else nullcontext():
            value = self.value(output)
        if not isinstance(value, Tensor) or value.shape != (self.rows,):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the explained value must be one number a row, shape ({self.rows},), got {got}")
        if not torch.isfinite(value).all():
            row = int((~torch.isfinite(value)).int().argmax())
            raise ValueError(f"the explained value of row {row} is {value[row].item()}: "
                             f"{_suspect(self.model, self._inputs(), output)}")
        if not value.requires_grad:
            raise IndependentOutput(independent([], self.rows))
        return value


def from_one(value: Tensor) -> Tensor:
    """1 / value, (B,): what relevance that starts at the value is multiplied by to start at 1.

    Raises: ValueError where the value is exactly zero.
    """
    if not bool(value.all()):
        row = int((value == 0).int().argmax())
        raise ValueError(f"the explained value of row {row} is exactly 0, and relevance that starts at 1 is relevance "
                         "over that value; explain another target, such as a single logit")
    return 1 / value


def independent(idle: list[int], rows: int) -> str:
    """What is wrong where these rows, or all, have no gradient."""
    some = f" of row {', '.join(map(str, idle[:5]))}" if 0 < len(idle) < rows else ""
    return (f"the explained value{some} does not depend on the input: its gradient is missing or zero throughout. Look "
            "for a target that the model never computes, a detached output, or weights that are all zero")


def _ordinary(value: Any) -> Any:
    """The value; of a tensor that was made under `torch.inference_mode`, a copy that autograd may keep."""
    if not isinstance(value, Tensor) or not value.is_inference():
        return value
    with torch.inference_mode(False):
        return value.clone()


def _suspect(model: nn.Module, inputs: Iterator[tuple[str, Tensor]], output: Any) -> str:
    """Where NaN or inf came from, in words."""
    found = [t for t in tree_flatten(output)[0] if isinstance(t, Tensor) and t.is_floating_point()]
    if found and all(torch.isfinite(t).all() for t in found):
        return "the model's output is finite, so the target makes it; give one that is defined for this output"
    for name, t in inputs:
        if t.is_floating_point() and not torch.isfinite(t).all():
            return f"the input {name!r} holds NaN or inf"
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the parameter {name!r} holds NaN or inf; load the weights again"
    for name, buffer in model.named_buffers():
        if buffer.isnan().any():  # inf is what masks are made of
            return f"the buffer {name!r} holds NaN; load the weights again"
    return "inputs and weights are finite, so the forward pass overflows; try a wider dtype"
