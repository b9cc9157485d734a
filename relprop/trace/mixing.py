"""What an attention makes of its values: the calls after the mix of values, up to what is added to the skip connection.

No list of names: the calls are those that a forward pass made, and are made again on other mixes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..ops import attention, lookup
from .observation import _PATTERN, Observer, _observing
from .opening import opened

_CHAIN = "_relprop_chain"


@dataclass(frozen=True, eq=False)
class Step:
    """A call of the forward pass, with a hole for the tensor that depends on the mix. `fixed`: whether it treats all
    positions alike.
    """

    func: Callable[..., Any]
    leaves: tuple[Any, ...]
    place: int
    rebuild: Any
    fixed: bool

    def __call__(self, x: Tensor) -> Tensor:
        args, kwargs = tree_unflatten([*self.leaves[:self.place], x, *self.leaves[self.place + 1:]], self.rebuild)
        return self.func(*args, **kwargs)


@dataclass(eq=False)
class Mixing:
    """One attention of a forward pass: its pattern, (B, H, T, S), and values, (B, H, S, K), as it used them.

    The mix of values sum_s A_{hts} v_{hs}, (B, H, T, K), had this `shape` in the model, `turned` if its last axes were
    swapped. `steps` are the calls after it, `projected` if one is a linear map, and `crossed` one that is neither.
    """

    path: str
    weights: Tensor
    values: Tensor
    shape: Size
    turned: bool
    steps: tuple[Step, ...] = ()
    projected: bool = False
    crossed: str | None = None

    @property
    def gated(self) -> bool:
        """Whether what the output makes of a value depends on the position that takes it, as behind a gate."""
        return not all(step.fixed for step in self.steps)

    def output(self, mix: Tensor) -> Tensor:
        """What the attention adds to the skip connection for a mix of values (B, H, T, K), without the constant that
        its biases are: (B, T, D), linear in `mix`.

        Raises: ValueError where what follows the mix is not linear, or mixes positions.
        """
        if self.crossed and not self.projected:
            raise ValueError(f"the values of the attention in {self.path!r} meet {self.crossed} on the way to its "
                             "output, which is not linear in them; use a method by gradients, such as "
                             "attention-gradcam")
        rows, _, length, _ = mix.shape
        found = (self._run(mix) - self._constant).flatten(0, -2)
        if found.shape[0] != rows * length:
            raise ValueError(f"the output of the attention in {self.path!r} is not one vector a position")
        if self._by_row:
            return found.unflatten(0, (rows, length))
        return found.unflatten(0, (length, rows)).transpose(0, 1)

    @cached_property
    def _constant(self) -> Tensor:
        """The output for no mix: what the biases are."""
        return self._run(torch.zeros_like(self.values[:, :, :1]).expand(*self.weights.shape[:3], -1))

    @cached_property
    def _by_row(self) -> bool:
        """Whether the model's own output has the batch before the positions."""
        probe = torch.zeros_like(self.values[:, :, :1]).repeat(1, 1, self.weights.shape[2], 1)
        probe[0] = 1
        moved = (self._run(probe) - self._constant).flatten(0, -2).any(-1)
        return not bool(moved[self.weights.shape[2]:].any())

    def _run(self, mix: Tensor) -> Tensor:
        x = (mix.mT if self.turned else mix).reshape(self.shape).clone()  # which a step may write to
        for step in self.steps:
            x = step(x)
        return x


class Mixer(Observer):
    """Observes the attentions of a forward pass, with patterns, and follows what comes of the values that they mix."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.mixings: list[Mixing] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(func, types, args, kwargs)
        if isinstance(output, Tensor):
            leaves, rebuild = tree_flatten((list(args), dict(kwargs or {})))
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and hasattr(leaf, _CHAIN)]
            if places:
                self._follow(func, leaves, places, rebuild, output)
        return output

    def _fused(self, func: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        output = super()._fused(func, query, key, value, *args, **options)
        self._mixed(self.patterns[-1], attention.grouped(value, query), output, False)
        return output

    def _notice(self, kind: str, args: Any, output: Tensor) -> None:
        super()._notice(kind, args, output)
        tensors = [a for a in args if isinstance(a, Tensor)]
        marks = [getattr(t, _PATTERN, False) for t in tensors]
        if kind == "matmul" and len(tensors) == 2 and any(marks) and output.dim() in (3, 4):
            turned = not marks[0]  # (A v)^T = v^T A^T
            weights, values = (t.mT for t in reversed(tensors)) if turned else tensors
            self._mixed(weights, values, output, turned)

    def _mixed(self, weights: Tensor, values: Tensor, output: Tensor, turned: bool) -> None:
        by_head = [t if t.dim() == 4 else t.unflatten(0, (self.rows, -1)) for t in (weights, values)]
        self.mixings.append(Mixing(self.path[-1], *by_head, output.shape, turned))
        setattr(output, _CHAIN, (self.mixings[-1], ()))

    def _follow(self, func: Any, leaves: list[Any], places: list[int], rebuild: Any, output: Tensor) -> None:
        """Adds the call to the chain of its operand, if the chain goes on."""
        mixing, steps = getattr(leaves[places[0]], _CHAIN)
        op = lookup(func)
        if hasattr(output, _CHAIN) and output is not leaves[places[0]] or (op is None and opened(func) is not None):
            return  # the calls inside were followed
        kind = _kind("" if op is None else op.kind, func, leaves, places)
        if kind is None or (kind == "linear" and mixing.projected):
            if steps is mixing.steps and (op is None or op.kind != "add"):
                mixing.crossed = getattr(func, "__name__", str(func))
            return
        chain = (*steps, Step(func, tuple(leaves), places[0], rebuild, kind != "gate"))
        if kind == "linear":
            mixing.steps, mixing.projected = chain, True
        elif steps is mixing.steps:
            mixing.steps = chain
        setattr(output, _CHAIN, (mixing, chain))


def _kind(kind: str, func: Any, leaves: list[Any], places: list[int]) -> str | None:
    """What a call is for its marked operand: "move", "linear" or "scale", the same at all positions, "gate", or None if
    it is not affine.
    """
    others = [leaf for i, leaf in enumerate(leaves) if i not in places and isinstance(leaf, Tensor)]
    alike = all(t.numel() == (t.shape[-1] if t.dim() else 1) for t in others)  # one number, or one a feature
    if len(places) > 1:
        return None
    if kind == "matmul":
        return "linear" if places[0] == 0 and others[0].dim() == 2 else None
    if kind == "add":
        return "move" if alike else None
    if kind == "mul":
        divided = "div" in func.__name__ and (places[0] > 0 or func.__name__.startswith("__r"))
        return None if divided else "scale" if alike else "gate"
    return kind if kind in ("move", "linear") else None


@torch.no_grad()
def mixings(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Mixing]]:
    """The output of one forward pass and each of its attentions, in order, with what it makes of its values."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()]
    with _observing(model, Mixer(tensors[0].shape[0] if tensors else 1)) as mixer:
        output = model(*args, **kwargs)
    return output, mixer.mixings
