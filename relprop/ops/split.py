"""One torch call on the way through the table forward: a value's relevant part from those of its operands.

A total x is split into x = rel + irrel. Only rel is carried, for S sources at once on a leading axis, so that irrel is
x - rel and the two sum by construction. A forward rule is a plain function of tensors that returns the relevant part
of what comes out; the functions that run them return None where no source reaches.

References: Murdoch et al. 2018 (Beyond word importance: contextual decomposition to extract interactions from LSTMs),
Hsu et al. 2024 (Efficient automated circuit discovery in transformers using contextual decomposition, "CD-T").
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

Rule = Callable[..., Any]


@dataclass
class Split:
    """One call that a source reaches.

    `func` is the torch function, `kind` its row of the table, `path` the module it was called in, `rule` what the
    division says for it, `share` its rule for constants, `output` the total that came out. `rel` gives the relevant
    part of a tensor, (S, ...), None where no source reaches it. `retrace` runs a function so that the calls inside it
    are split in their turn; `added` gives the constants that were added to a tensor of scores. `lost`: what a rule
    that does not sum leaves out, (S, ...).
    """

    func: Callable[..., Any]
    kind: str
    path: str
    rule: Any
    share: Rule
    output: Any
    rel: Callable[[Any], Tensor | None]
    sources: int
    retrace: Callable[[Callable[..., Any]], Any]
    added: Callable[[Tensor], Tensor | None] = field(default=lambda tensor: None)
    whole: bool = True
    lost: Tensor | None = field(default=None)

    def constant(self, rel: Tensor, total: Tensor, constant: Tensor) -> Tensor:
        """The share of a constant that is relevant, by the relevant part of the total that it is added to; (S, ...)."""
        share = self.share(rel, total, constant)
        if not self.whole:
            self.lost = constant - share - self.share(total - rel, total, constant)
        return share


def each(run: Callable[..., Any], *parts: Tensor) -> Any:
    """`run` of each source's parts, (S, ...) each: what it returns with the sources in front."""
    try:
        return torch.vmap(run)(*parts)
    except (RuntimeError, ValueError):  # an op without a batching rule, or one that looks at values
        found = [run(*(part[source] for part in parts)) for source in range(len(parts[0]))]
        return tree_map(lambda *ones: torch.stack(ones) if isinstance(ones[0], Tensor) else ones[0], *found)


def led(rel: Tensor, dims: int) -> Tensor:
    """A part (S, ...) whose axes after the first are as many as `dims`, so that it broadcasts as its total does."""
    missing = dims - (rel.dim() - 1)
    return rel if missing <= 0 else rel.reshape(rel.shape[0], *(1,) * missing, *rel.shape[1:])


def refilled(args: Any, kwargs: Any, parts: Callable[[Tensor], Tensor | None], run: Callable[..., Any],
             constant: Callable[[Tensor], Any] = torch.zeros_like) -> Any:
    """`run(*args, **kwargs)` for each source with `parts` in the place of the tensors that have some, and `constant` of
    the other floating ones.
    """
    leaves, rebuild = tree_flatten((list(args), dict(kwargs)))
    found = [parts(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
    places = [place for place, part in enumerate(found) if part is not None]
    fixed = [constant(leaf) if isinstance(leaf, Tensor) and part is None and leaf.is_floating_point() else leaf
             for leaf, part in zip(leaves, found, strict=True)]

    def once(*moving: Tensor) -> Any:
        filled = list(fixed)
        for place, part in zip(places, moving, strict=True):
            filled[place] = part
        inner_args, inner_kwargs = tree_unflatten(filled, rebuild)
        return run(*inner_args, **inner_kwargs)

    return each(once, *(found[place] for place in places))


def difference(call: Split, *args: Any, **kwargs: Any) -> Any:
    """rel = f(x) - f(x - rel), for any f: what the output loses with the relevant part (Hsu et al. 2024, for
    activations).

    All cross terms are relevant. What f is at zero stays irrelevant.
    """
    def irrel(x: Tensor) -> Tensor | None:
        part = call.rel(x)
        return None if part is None else x - part

    rest = refilled(args, kwargs, irrel, call.func, constant=lambda x: x)
    return tree_map(lambda y, i: y - i if isinstance(y, Tensor) and y.is_floating_point() else None, call.output, rest)


def moved(call: Split, *args: Any, **kwargs: Any) -> Any:
    """Ops that are linear in their tensors together: what they do to the total, they do to rel; constants among the
    tensors are irrelevant.
    """
    return refilled(args, kwargs, call.rel, call.func)
