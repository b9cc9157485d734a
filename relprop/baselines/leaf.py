"""The input as a leaf of autograd, pixels or embeddings of token ids, and the target as a function of what stands in
its place.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType, TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .. import rows
from ..errors import IndependentOutput
from ..result import Ledger, Relevance
from ..still import settled
from ..subject import Subject
from ..target import Targets
from ..tokens import Batch, TextUnits

FOLDS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "sum": lambda x, dim: x.sum(dim),
    "norm": lambda x, dim: x.abs().sum(dim),
    "max": lambda x, dim: x.abs().amax(dim),
}


class Embedded:
    """While inside `with`, the first module that is called with the token ids gives its output as a leaf of autograd,
    or gives `given` (B, T, D) instead.

    Found by what it is called with, not by its name; the ids stay the model's input (given embeddings instead,
    classifiers read a padding token of right-padded rows). `module` and `leaf` (B, T, D) are set by the first forward.
    """

    def __init__(self, model: nn.Module, ids: Tensor, given: Tensor | None = None) -> None:
        self.model, self.ids, self.given = model, ids, given
        self.module: nn.Module | None = None
        self.leaf: Tensor | None = None

    def __enter__(self) -> Embedded:
        self._handles = [module.register_forward_hook(self._hook, with_kwargs=True) for module in self.model.modules()]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> Tensor | None:
        if self.module is not None or not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        called = any(isinstance(value, Tensor) and value.shape == self.ids.shape and bool((value == self.ids).all())
                     for value in [*args, *kwargs.values()])
        if not called or output.shape[:-1] != self.ids.shape:
            return None
        self.module = module
        self.leaf = output.detach().requires_grad_() if self.given is None else self.given.to(output.dtype)
        return self.leaf.clone()  # not the leaf itself, which must not be written to


class Held:
    """While inside `with`, what `module` reads (or gives) at its first call is kept in `value`, or is `given` instead.

    Of several tensors the first floating one with features counts; the rest, masks or caches, is left as it is.
    """

    def __init__(self, module: nn.Module, *, reads: bool, given: Tensor | None = None) -> None:
        self.module, self.reads, self.given = module, reads, given
        self.value: Tensor | None = None

    def __enter__(self) -> Held:
        if self.reads:
            self._handle = self.module.register_forward_pre_hook(self._before, with_kwargs=True)
        else:
            self._handle = self.module.register_forward_hook(lambda module, args, output: self._swapped(output))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._handle.remove()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return self._swapped((args, kwargs))

    def _swapped(self, tree: object) -> object:
        """The tree with `given` for its first tensor of features, which is kept."""
        flat, rebuild = tree_flatten(tree)
        place = next((i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor) and leaf.is_floating_point()
                      and leaf.ndim > 2), None)
        if self.value is not None or place is None:
            return tree
        self.value = flat[place].detach()
        if self.given is not None:
            flat[place] = self.given.to(self.value.dtype)
        return tree_unflatten(flat, rebuild)


class Derivative(NamedTuple):
    """Of the target by the leaf: `slope`, shape of `leaf` (B, ...). `module` is the embedding, None for pixels."""

    value: Tensor
    targets: Targets
    names: list[str]
    leaf: Tensor
    slope: Tensor
    module: nn.Module | None


def derivative(subject: Subject, batch: Batch, targets: Targets) -> Derivative:
    """The target by the input, the prediction fixed and the embedding found. Cost: one forward, one backward.

    Raises: IndependentOutput if the target does not depend on the input; ValueError if no module takes the ids.
    """
    _, source = rows.leaf(batch)
    with settled(subject.model), torch.inference_mode(False), torch.enable_grad():
        if source.is_floating_point():
            embedded, leaf = None, source.detach().clone().requires_grad_()
            output = subject.forward(rows.put(batch, leaf))
        else:
            with Embedded(subject.model, source) as embedded:
                output = subject.forward(batch)
            leaf = embedded.leaf
            if leaf is None:
                raise ValueError(f"no module of {subject.name} is called with the token ids {tuple(source.shape)}; "
                                 "gradient methods need the embedding to be a module")
        targets = targets.fixed(output, batch)
        value = targets.value(output, batch)
        slope = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0] if value.requires_grad else None
    if slope is None or not slope.flatten(1).any(1).all():
        raise IndependentOutput(f"the target ({', '.join(targets.names(output, batch))}) does not depend on the input, "
                                "so there is nothing to explain")
    module = None if embedded is None else embedded.module
    precise = torch.promote_types(leaf.dtype, torch.float32)  # half precision overflows in sums over features
    return Derivative(value.detach(), targets, targets.names(output, batch), leaf.detach().to(precise),
                      slope.to(precise), module)


class Runs:
    """The target as a function of changed leaves, which Captum calls; counts what goes through the model.

    `forwards` and `backwards` are passes of the batch, the derivative's own among them: where rows take unlike numbers,
    their mean, rounded up.
    """

    def __init__(self, subject: Subject, batch: Batch, found: Derivative, *, batch_size: int = 32) -> None:
        self.subject, self.batch, self.found, self.batch_size = subject, batch, found, batch_size
        self._forward, self._backward = batch.rows, batch.rows
        self._bar = None

    @property
    def forwards(self) -> int:
        return math.ceil(self._forward / self.batch.rows)

    @property
    def backwards(self) -> int:
        return math.ceil(self._backward / self.batch.rows)

    @contextmanager
    def progress(self, name: str, total: int, shown: bool) -> Iterator[None]:
        """A bar of the rows that go forward, and a model held still, while inside."""
        from tqdm.auto import tqdm

        bar = tqdm(total=total, desc=name, unit="row", disable=not shown, leave=False)
        with settled(self.subject.model), torch.inference_mode(False), bar as self._bar:
            yield
        self._bar = None

    def count(self, forwards: int, *, backwards: int = 0) -> None:
        """Rows that went through the model."""
        self._forward += forwards
        self._backward += backwards
        if self._bar is not None:
            self._bar.update(forwards)

    def whole(self, changed: Tensor) -> Tensor:
        """Target of the whole batch with changed leaves, blocks of B rows one after the other, (n B,)."""
        return self._run(changed, torch.arange(len(changed)) % self.batch.rows)

    def ids(self, changed: Tensor) -> Tensor:
        """As `whole`, of changed inputs as the model takes them: token ids where these are what it reads."""
        which = torch.arange(len(changed)) % self.batch.rows
        return self._value(rows.put(self.batch.take(which), changed), which)

    def inner(self, module: nn.Module, changed: Tensor, *, reads: bool) -> Tensor:
        """As `whole`, of changed values of what a module reads or gives."""
        which = torch.arange(len(changed)) % self.batch.rows
        with Held(module, reads=reads, given=changed):
            return self._value(self.batch.take(which), which)

    def of_row(self, row: int) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
        """The target as a function of one row's leaf without padding, (n, ...), and where that is in it, (T,)."""
        inside, leaf = real(self.batch, row), self.found.leaf
        inside = None if inside is None else inside.to(leaf.device)

        def values(own: Tensor) -> Tensor:
            changed = own
            if inside is not None:
                changed = leaf[row].expand(len(own), -1, -1).clone()
                changed[:, inside] = own
            return self._run(changed, torch.full((len(own),), row))

        return values, inside

    def gradients(self, forward_fn: Callable[[Tensor], Tensor], inputs: tuple[Tensor, ...], target_ind: object = None,
                  additional_forward_args: object = None) -> tuple[Tensor, ...]:
        """Captum's `gradient_func`, `batch_size` rows at a time: only a part's graph is in memory, and what is drawn
        at random does not depend on the parts.
        """
        parts = []
        with torch.enable_grad():
            for part in inputs[0].detach().split(self.batch_size):
                part = part.clone().requires_grad_()
                parts.append(torch.autograd.grad(forward_fn(part).sum(), part)[0])
                self.count(0, backwards=len(part))
        return torch.cat(parts),

    def _run(self, changed: Tensor, which: Tensor) -> Tensor:
        taken = self.batch.take(which)
        source = rows.leaf(taken)[1]
        if self.found.module is None:
            return self._value(rows.put(taken, changed.to(source.dtype)), which)
        with Embedded(self.found.module, source, changed):
            return self._value(taken, which)

    def _value(self, taken: Batch, which: Tensor) -> Tensor:
        self.count(len(which))
        value = self.found.targets.take(which.tolist()).value(self.subject.forward(taken), taken)
        if not value.isfinite().all():
            raise ValueError(f"the target turns {value[~value.isfinite()][0].item()} on a changed input; choose "
                             "another baseline, less noise, or a wider dtype")
        return value


def real(batch: Batch, row: int) -> Tensor | None:
    """Which positions of a row are no padding, (T,); None where there is none."""
    return ~torch.tensor(batch.units.padding[row]) if isinstance(batch.units, TextUnits) else None


def content(batch: Batch, row: int) -> Tensor:
    """A row's own input, without padding."""
    inside, whole = real(batch, row), rows.leaf(batch)[1][row]
    return whole if inside is None else whole[inside.to(whole.device)]


def result(subject: Subject, batch: Batch, found: Derivative, whole: Tensor, *, method: str,
           fold: str = "sum") -> Relevance:
    """Relevance of each feature, `whole` (B, ...), folded into a map over channels (dim 1) or features (the last)."""
    folded = whole if whole.ndim == 2 else FOLDS[fold](whole, 1 if whole.ndim == 4 else -1)
    return Relevance(map=folded.float().cpu(), value=found.value.cpu(), target=found.names, method=method,
                     conservation="not conservative", units=batch.units, ledger=None, forwards=1, backwards=1,
                     inputs={str(rows.leaf(batch)[0]): whole.cpu()}, latents={},
                     provenance={"model": subject.name, "fold": fold})


def completed(plain: Relevance, runs: Runs, total: Tensor, start: Tensor, about: dict, *, conservation: str,
              rest: dict[str, Tensor] | None = None) -> Relevance:
    """The result with the books of a method that promises sum R = y(x) - y(x'): y(x') is booked as "baseline", and the
    books' residual is the convergence delta.

    Args: total: sum R, (B,). start: y(x'), (B,). about: for the provenance. rest: what is not in the map, by name.
    """
    value = runs.found.value.cpu()
    absorbed = {name: entry.detach().to(value) for name, entry in {"baseline": start, **(rest or {})}.items()}
    ledger = Ledger(value=value, input=total.to(value), absorbed=absorbed, layers=None)
    about = {**about, "convergence_delta": (-ledger.residual).tolist()}
    return replace(plain, conservation=conservation, ledger=ledger, provenance=plain.provenance | about,
                   forwards=runs.forwards, backwards=runs.backwards)


def summed(shares: Tensor) -> Tensor:
    """Each row's sum, (B,), in float64."""
    return shares.flatten(1).sum(1, dtype=torch.float64)


def captum() -> ModuleType:
    """Captum's attribution methods. Raises: ImportError without it."""
    try:
        from captum import attr
    except ImportError as cause:
        raise ImportError("this method is Captum's; pip install captum") from cause
    return attr


def at_least_one(**numbers: int) -> None:
    """Raises ValueError for an option that is no whole number of at least 1."""
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{name} must be at least 1, a whole number, got {number!r}")
