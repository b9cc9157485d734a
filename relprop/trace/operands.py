"""What attentions read: queries, keys and values head by head, seen or replaced while a model runs as it is.

A fused kernel is handed all three. In the open, queries and keys meet in the product whose result goes to the softmax,
and values in the one after it. Keys and values that several heads share are spread, so that each head has its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import lookup
from .interception import Tap
from .intervention import PATTERN, Change, Editor, Heads

_PRODUCTS, _MARK = "_relprop_products", "_relprop_pattern"
_CARRIED = ("add", "mul", "move", "activation", "softmax", "linear")

Product = tuple[str, int]
"""A product of two tensors: the module it is made in, and the how-manieth there it is."""


class Enough(Exception):
    """A forward pass has come as far as was wanted."""


@dataclass(frozen=True, eq=False)
class Read:
    """What is done with what an attention of this many heads reads: `change` is given "q", "k" or "v" and the operand,
    (rows, H, ...), and returns what goes in its place.
    """

    heads: int
    change: Callable[[str, Tensor], Tensor]


class Reading(Editor):
    """An editor that also replaces what attentions read: `reads` by the tap of the pattern.

    `scores` names the product of queries and keys of each attention in the open. A pass that does not know them finds
    them: afterwards `seen` has, by the tap of the pattern, all products that its scores are made of.
    """

    def __init__(self, changes: Mapping[Tap, Change | Heads], *, reads: Mapping[Tap, Read] | None = None,
                 scores: Mapping[Tap, Product] | None = None) -> None:
        self.reads = dict(reads or {})
        self.scores = {product: tap for tap, product in (scores or {}).items() if tap in self.reads}
        self.seen: dict[Tap, frozenset[Product]] = {}
        super().__init__(changes)

    def install(self, changes: Mapping[Tap, Change | Heads]) -> None:
        super().install(changes)
        self._patterns = True  # patterns are followed from the softmax to the values, whether one is changed or not

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = getattr(lookup(func), "kind", "")
        if self.asleep or kind not in ("matmul", *_CARRIED):
            return super().__torch_function__(func, types, args, kwargs)
        found: frozenset[Product] = frozenset()
        if kind == "matmul":
            args, kwargs, found = self._product(list(args), dict(kwargs))
        else:
            for value in (*args, *kwargs.values()):
                found |= getattr(value, _PRODUCTS, frozenset())
        output = super().__torch_function__(func, types, args, kwargs)
        if found and isinstance(output, Tensor):
            setattr(output, _PRODUCTS, found)
        return output

    def _fused(self, func: Any, query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any) -> Tensor:
        read = self.reads.get(self._next())
        if read is not None:
            query, key, value = (_replaced(read, name, x) for name, x in (("q", query), ("k", key), ("v", value)))
            options.pop("enable_gqa", None)  # every head has its own by now
        return super()._fused(func, query, key, value, *more, **options)

    def _product(self, args: list[Any], kwargs: dict[str, Any]) -> tuple[tuple, dict, frozenset[Product]]:
        """The operands of a product, replaced if an attention reads them; and the product, if it may make scores."""
        owners = [(args, place) for place in range(len(args))] + [(kwargs, name) for name in kwargs]
        tensors = [(owner, place) for owner, place in owners if isinstance(owner[place], Tensor)
                   and owner[place].dim() >= 3 and not isinstance(owner[place], nn.Parameter)]
        operands = tensors[-2:]  # in front is what `baddbmm` adds
        weights = [i for i, (owner, place) in enumerate(operands) if getattr(owner[place], _MARK, False)]
        found: frozenset[Product] = frozenset()
        if weights and len(operands) == 2:
            (owner, place), (other, at) = operands[weights[0]], operands[1 - weights[0]]
            tap = self._next()
            self.seen[tap] = getattr(owner[place], _PRODUCTS, frozenset())
            if tap in self.reads:
                other[at] = _replaced(self.reads[tap], "v", other[at])
        elif len(operands) == 2:
            key = (self.path[-1], "product", "")
            product = self.path[-1], self._counts.get(key, 0)
            self._counts[key] = product[1] + 1
            found = frozenset([product])
            if product in self.scores:
                for name, (owner, place) in zip("qk", operands):
                    owner[place] = _replaced(self.reads[self.scores[product]], name, owner[place])
        return tuple(args), kwargs, found

    def _next(self) -> Tap:
        """The tap of the pattern of the attention that is being made, which is counted."""
        key = (self.path[-1], "attention", "operands")
        nth = self._counts.get(key, 0)
        self._counts[key] = nth + 1
        return Tap(self.path[-1], "attention", PATTERN, nth)


def _replaced(read: Read, name: str, x: Tensor) -> Tensor:
    """An operand, (rows, H, ...) or (rows H, ...), changed; of heads that share one a copy each."""
    with torch._C.DisableTorchFunction():  # what a change calls itself is no call of the model
        split = x if x.dim() > 3 else x.unflatten(0, (-1, read.heads))
        if split.shape[1] != read.heads:
            split = split.repeat_interleave(read.heads // split.shape[1], dim=1)
        changed = read.change(name, split)
        return changed if x.dim() > 3 else changed.flatten(0, 1)


__all__ = ["Enough", "Product", "Read", "Reading"]
