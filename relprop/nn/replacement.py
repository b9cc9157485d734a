"""The modules of somebody's model made into drop-ins for a while, and given back."""
from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

from torch.nn import Module

from ..composite import Composite, get
from ..still import settled
from .ruled import Ruling, adopt, forward_of, moves, parts

_CALLERS = frozenset({
    "torch.nn.modules.transformer.TransformerEncoder", "torchvision.models.vision_transformer.Encoder",
    "torchvision.models.vision_transformer.VisionTransformer", "timm.models.vision_transformer.VisionTransformer",
    "timm.layers.patch_embed.PatchEmbed", "timm.layers.mlp.Mlp"})
"""Modules that only call modules and move data, add constants and average, for which the plain gradient is the rule."""


class Replacement:
    """A model whose modules are drop-ins until `undo`, or until the end of the `with` block.

    `replaced` lists the paths of the modules that follow the composite, `unseen` those whose own torch calls do not.
    """

    def __init__(self, model: Module, composite: Composite) -> None:
        found = list(parts(model))
        if any(isinstance(ruling := module.__dict__.get("_ruling"), Ruling) and ruling.lent for _, module, _ in found):
            raise ValueError("the model's modules are replaced already; undo that first")
        self.replaced = tuple(path for path, _, dropin in found if dropin is not None)
        self.unseen = tuple(path for path, module, dropin in found if dropin is None and not _known(module))
        if not self.replaced:
            raise ValueError(f"nothing to replace in {type(model).__name__}: no module of it has a drop-in")
        with ExitStack() as undo:
            undo.enter_context(settled(model))
            for path, module, dropin in found:
                if dropin is not None:
                    undo.callback(_give_back, module, type(module), module.__dict__.get("_ruling"))
                    adopt(module, dropin, Ruling(composite, path, lent=True))
            self._undo = undo.pop_all()

    def undo(self) -> None:
        """Give every module back as it was: class, mode, `requires_grad`. A second time does nothing."""
        self._undo.close()

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.replaced)} modules replaced, {len(self.unseen)} with calls unseen)"


def replace(model: Module, composite: str | Composite = "attnlrp") -> Replacement:
    """Makes the modules of `model` drop-ins, in place, until the result's `undo()` or the end of its `with` block.

    In between a plain `.backward()` gives relevance as `x * x.grad`, for x a leaf that requires its gradient: the map
    of `relprop.explain`, without its books. The model is in eval mode, its parameters are frozen. Every module stays
    the object it is, with its parameters and hooks; only its class is another.

        with relprop.nn.replace(model, "attnlrp"):
            model(x.requires_grad_())[:, label].sum().backward()
        relevance = x * x.grad

    It reaches timm's `VisionTransformer`, torchvision's, `torch.nn.TransformerEncoder` and its layer,
    `torch.nn.MultiheadAttention`, every torch module with a drop-in, and other modules without parts. What any other
    module computes by itself in its forward (`x + y`, a softmax) is out of sight: that keeps its plain gradient, and a
    warning names the module. `relprop.explain` sees such calls too.

    Raises: TypeError if `model` is not a module; ValueError if none of its modules has a drop-in, they are replaced
        already, or the composite is unknown.
    """
    if not isinstance(model, Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    replacement = Replacement(model, get(composite))
    if replacement.unseen:
        named = ", ".join(path or "(the model itself)" for path in replacement.unseen[:5])
        more = len(replacement.unseen) - 5
        warnings.warn(f"what these modules compute outside of their parts keeps its plain gradient: {named}"
                      f"{f' and {more} more' if more > 0 else ''}. If that is more than adding constants and moving "
                      "data, use relprop.explain, which sees every call", stacklevel=2)
    return replacement


def _known(module: Module) -> bool:
    forward = forward_of(module)
    whole = f"{type(module).__module__}.{type(module).__qualname__}"  # a subclass may have other methods than forward
    return forward is not None and (moves(forward) or whole in _CALLERS)


def _give_back(module: Module, original: type[Module], ruling: Ruling | None) -> None:
    module.__class__ = original
    if ruling is None:
        del module._ruling
    else:
        module._ruling = ruling
