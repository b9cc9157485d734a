"""The modules of somebody's model made into drop-ins for a while, and given back."""
from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

from torch.nn import Module

from ..composite import Composite, get
from ..family import facts
from ..still import settled
from .ruled import Ruling, adopt, parts, unseen


class Replacement:
    """A model whose modules are drop-ins until `undo`, or until the end of the `with` block.

    `replaced` lists the paths of the modules that follow the composite, `unseen` of those that cannot.
    """

    def __init__(self, model: Module, composite: Composite) -> None:
        found = list(parts(model))
        if any(isinstance(ruling := module.__dict__.get("_ruling"), Ruling) and ruling.lent for _, module, _ in found):
            raise ValueError("the model's modules are replaced already; undo that first")
        self.replaced = tuple(path for path, _, dropin in found if dropin is not None)
        self.unseen = tuple(path for path, module, dropin in found if dropin is None and unseen(module))
        if not self.replaced:
            raise ValueError(f"nothing to replace in {type(model).__name__}: its modules only move data, or run a "
                             "forward of their own; use relprop.explain, which sees every call")
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

    It reaches every module that runs its class's forward: torch's, timm's, torchvision's, and those of one's own. A
    module whose forward was set on the instance, or compiled, keeps its plain gradient; a warning names it. What is
    explained is a floating input; token ids have none, so give embeddings, or use `relprop.explain`.

    Raises: TypeError if `model` is not a module; ValueError if none of its modules can be replaced, they are replaced
        already, or the composite is unknown.
    """
    if not isinstance(model, Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(getattr(model, "_orig_mod", None), Module):
        raise ValueError("a compiled model makes its calls out of sight; replace model._orig_mod and call that, or use "
                         "relprop.explain")
    pixels = facts(model).pixels
    rules = get(composite) if pixels is None else get(composite).boxed(pixels.mean, pixels.std)
    replacement = Replacement(model, rules)
    if replacement.unseen:
        named = ", ".join(path or "(the model itself)" for path in replacement.unseen[:5])
        more = len(replacement.unseen) - 5
        warnings.warn(f"these modules run a forward of their own and keep its plain gradient: {named}"
                      f"{f' and {more} more' if more > 0 else ''}. relprop.explain sees the calls in them",
                      stacklevel=2)
    return replacement


def _give_back(module: Module, original: type[Module], ruling: Ruling | None) -> None:
    module.__class__ = original
    if ruling is None:
        del module._ruling
    else:
        module._ruling = ruling
