"""Each composite as an attribution of Captum, to stand where one of Captum's own stands: in its metrics, in its noise
tunnel, in its figures.

    >>> import torch
    >>> from relprop.captum import AttnLRP
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 3, bias=False))
    >>> x = torch.randn(2, 4)
    >>> relevance, delta = AttnLRP(model).attribute(x, target=[2, 0], return_convergence_delta=True)
    >>> bool(torch.allclose(model(x)[[0, 1], [2, 0]] - relevance.sum(1), delta, atol=1e-6))
    True

Only this module imports Captum when it is imported, because its classes are subclasses of Captum's.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from captum._utils.common import _format_additional_forward_args, _select_targets
from captum.attr import Attribution
from captum.log import log_usage
from torch import Tensor, nn

from . import composite as composites
from .composite import Composite
from .relevance import propagate
from .still import settled
from .target import logits
from .way import propagate_along

Target = int | tuple[int, ...] | Tensor | list | None
Tensors = Tensor | tuple[Tensor, ...]


class CompositeAttribution(Attribution):
    """Relevance of the inputs by a composite, one backward pass through the model as it is, or one for each of the
    composite's points on a way.

    Floating inputs (pixels, embeddings) get relevance of their own shape. Token ids (B, T) get that of their
    embeddings, summed over features, (B, T): a tensor of the inputs' shape in every case. Where Captum's own classes
    need the embeddings as an input, with `forward_func=lambda e, mask: model(inputs_embeds=e, attention_mask=mask)`,
    these take ids as well.

    Args: model: any module; it is given back as it came. composite: a name or a `Composite`; the subclasses have one.
        forward_func: how the model is called, where `model(*inputs, *additional_forward_args)` is not how; it calls
        `model`. ledger: keep the books, so that a leak is an error; about a tenth of the cost. unruled, spread_bias: as
        of `relprop.explain`. mask_token, kept: where the way of a composite that has one, such as "attnlrp-path",
        begins: this id in the place of every token id but those kept, special tokens and padding. Floating inputs have
        no such text and are explained at the input alone, as everywhere.
    Raises: TypeError for a model that is no module; ValueError for an unknown composite, and for a mask token that is
        no id or that the composite does not ask for.
    """

    composite: str | Composite | None = None

    def __init__(self, model: nn.Module, composite: str | Composite | None = None, *,
                 forward_func: Callable | None = None, ledger: bool = True, unruled: str = "error",
                 spread_bias: bool = False, mask_token: int | None = None, kept: Sequence[int] = ()) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"relevance passes through a module, and {type(model).__name__} is none; give the model, "
                            "and the function that calls it as forward_func")
        chosen = self.composite if composite is None else composite
        if chosen is None:
            raise ValueError(f"no composite; give one of {', '.join(composites.NAMES)}, or a Composite")
        super().__init__(model if forward_func is None else forward_func)
        self.model, self.composite = model, composites.get(chosen)
        if mask_token is not None and self.composite.points == (1.0,):
            raise ValueError(f"{self.composite.name} explains at the input alone and takes no mask_token")
        if mask_token is not None and (not isinstance(mask_token, int) or mask_token < 0):
            raise ValueError(f"mask_token is the id of a token, got {mask_token!r}")
        self._mask_token, self._kept = mask_token, tuple(kept)
        self._options = {"ledger": ledger, "unruled": unruled, "spread_bias": spread_bias}

    @log_usage(part_of_slo=True)  # as Captum's own have it: its noise tunnel looks for what this wraps
    def attribute(self, inputs: Tensors, target: Target = None, additional_forward_args: object = None,
                  return_convergence_delta: bool = False) -> Tensors | tuple[Tensors, Tensor]:
        """Relevance of each entry of the inputs, in the unit of the output that `target` selects.

        Args: inputs: a tensor (B, ...), or a tuple of them. target: as everywhere in Captum: an index, a tuple, one a
            row, or None for an output of one number a row. additional_forward_args: what the model takes after them; it
            is not explained, and counts as constant. return_convergence_delta: and what did not reach the inputs.
        Returns: relevance, of the shape of each input, in at least float32; and the delta, (B,): value - sum of
            relevance, which the biases and what the composite does not conserve took.
        Raises: as `relprop.relevance.propagate`; ValueError if the target selects no number a row, and for token ids
            without a `mask_token` where the composite's way begins with it.
        """
        single = isinstance(inputs, Tensor)
        explained = (inputs,) if single else tuple(inputs)
        rest = _format_additional_forward_args(additional_forward_args) or ()
        rules, run = self._passes(explained)
        plain = self.forward_func is self.model and not rest
        module = self.model if plain else _Called(self.model, self.forward_func)
        with nullcontext() if plain else settled(self.model):  # of which `module` has the parts, and not itself
            found = run(module, explained, {f"mask {i}": value for i, value in enumerate(rest)},
                              _Value(target, len(explained[0])), rules, **self._options)
        parts = tuple(_of(found.relevance, str(i), value) for i, value in enumerate(explained))
        relevance = parts[0] if single else parts
        if not return_convergence_delta:
            return relevance
        return relevance, self.compute_convergence_delta(relevance, found.value)

    def _passes(self, inputs: tuple[Tensor, ...]) -> tuple[Composite, Callable]:
        """The rules, and what propagates by them: along the way from mask tokens, or at the input alone."""
        ids = [str(i) for i, value in enumerate(inputs) if not value.is_floating_point()]
        if self.composite.points == (1.0,) or not ids:
            return replace(self.composite, points=(1.0,)), propagate
        if self._mask_token is None:
            raise ValueError(f"{self.composite.name} needs a text of mask tokens where its way begins; give the id as "
                             "mask_token, and those of special tokens as kept, or take the composite attnlrp")
        return self.composite, partial(propagate_along, starts=dict.fromkeys(ids, self._masked))

    def _masked(self, ids: Tensor) -> Tensor:
        kept = torch.isin(ids, torch.tensor(self._kept, dtype=ids.dtype, device=ids.device))
        return torch.where(kept, ids, self._mask_token)

    def has_convergence_delta(self) -> bool:
        return True

    def compute_convergence_delta(self, attributions: Tensors, output: Tensor) -> Tensor:
        """What did not reach the inputs, (B,): output - sum of the attributions, as Captum's `LRP` has it.

        Args: output: the value that was explained, (B,).
        """
        parts = (attributions,) if isinstance(attributions, Tensor) else attributions
        return output.flatten() - sum(part.flatten(1).sum(1) for part in parts)

    @property
    def multiplies_by_inputs(self) -> bool:
        return True


class AttnLRP(CompositeAttribution):
    """By `composite.attnlrp` (Achtibat et al. 2024). Not conservative."""

    composite = "attnlrp"


class AttnLRPGamma(CompositeAttribution):
    """By `composite.attnlrp_gamma`, for vision transformers. Not conservative."""

    composite = "attnlrp-gamma"


class AttnLRPPath(CompositeAttribution):
    """By `composite.attnlrp_path`, the default for text. Not conservative.

    Token ids need `mask_token=tokenizer.mask_token_id` and `kept=tokenizer.all_special_ids`, as `explain` finds them.
    """

    composite = "attnlrp-path"


class AttnLRPVision(CompositeAttribution):
    """By `composite.attnlrp_vision`, the default for pictures. Not conservative."""

    composite = "attnlrp-vision"


class CPLRP(CompositeAttribution):
    """By `composite.cp_lrp` (Ali et al. 2022). Conservative up to biases."""

    composite = "cp-lrp"


class DeepTaylor(CompositeAttribution):
    """By `composite.deep_taylor` (Montavon et al. 2017). Conservative up to biases.

    The box at the pixels is each row's own least and greatest entry; `composite.get("deep-taylor").boxed(mean, std)`
    has that of the normalisation.
    """

    composite = "deep-taylor"


class EpsilonLRP(CompositeAttribution):
    """By `composite.epsilon` (Bach et al. 2015). Conservative up to biases."""

    composite = "epsilon"


class GammaLRP(CompositeAttribution):
    """By `composite.gamma`. Conservative up to biases."""

    composite = "gamma"


class GradientInput(CompositeAttribution):
    """By `composite.gradient`: gradient x input, with a ledger. Not conservative."""

    composite = "gradient"


class _Called(nn.Module):
    """The parts of a model under its own paths, and a function that calls it. Arguments that are not explained have
    names with "mask", by which `propagate` leaves them alone.
    """

    def __init__(self, model: nn.Module, call: Callable) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        self.__dict__["call"] = call  # not as a part, which a module that is set becomes

    def forward(self, *inputs: Tensor, **rest: object) -> object:
        return self.call(*inputs, *rest.values())


@dataclass(frozen=True)
class _Value:
    """From the model's output to the number of each row that Captum's `target` selects."""

    target: Target
    rows: int

    def __call__(self, output: object) -> Tensor:
        selected = _select_targets(output if isinstance(output, Tensor) else logits(output), self.target)
        if not isinstance(selected, Tensor) or selected.numel() != self.rows:
            raise ValueError(f"target {self.target!r} selects {tuple(selected.shape)} of the output, expected one "
                             f"number for each of {self.rows} rows; give the index of a class, or (position, token)")
        return selected.reshape(self.rows)

    def row(self, row: int, rows: int) -> _Value:
        """The same for one row alone."""
        several = isinstance(self.target, list) or isinstance(self.target, Tensor) and self.target.numel() > 1
        return _Value(self.target[row:row + 1] if several else self.target, 1)


def _of(relevance: dict[str, Tensor], name: str, value: Tensor) -> Tensor:
    """Relevance of one input in its own shape; of ids, summed over features; zero where none came."""
    found = [part for key, part in relevance.items() if key == name or key.startswith(f"{name}#")]
    if not found:
        return torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    return sum(found) if value.is_floating_point() else sum(part.sum(-1) for part in found)
