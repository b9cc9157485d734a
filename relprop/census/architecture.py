"""What the census asks about: one architecture, how a tiny instance of it is built, and what it reads."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

DEVIATION = 0.15
"""Standard deviation of the random weights."""

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One architecture of a library.

    `library` is "transformers" or "timm"; `task` one of transformers' task names; `family` what the library calls the
    kind of model ("llama", "vit"); `name` the class, or timm's name of the model. `build` makes a tiny instance with
    the library's own initial weights, and `inputs` what it reads, by the names of its arguments, two rows of it.
    `names`: those of the library's models that it stands for, where one architecture has several.
    """

    library: str
    task: str
    family: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], Inputs]
    names: tuple[str, ...] = ()

    @property
    def stands(self) -> int:
        """How many names of the library it stands for."""
        return max(len(self.names), 1)

    @property
    def key(self) -> str:
        """What it is found by: "transformers/text-generation/llama/LlamaForCausalLM"."""
        return f"{self.library}/{self.task}/{self.family}/{self.name}"

    def model(self, seed: int = 0) -> nn.Module:
        """A tiny instance with random weights, in eval mode."""
        torch.manual_seed(seed)
        model = randomized(self.build().eval(), seed)
        norms = [part for part in model.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
        if norms:
            _meet(model, norms, self.inputs(model), seed)
        return model


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with random weights of standard deviation `DEVIATION`: matrices around zero, vectors around what they
    start from (norms around one), so that none is at the value that hides an error.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * DEVIATION
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
        for buffer in model.buffers():
            if buffer.is_floating_point() and not buffer.isfinite().all():
                buffer.nan_to_num_()  # buffers of an instance that was made empty
    return model


def _meet(model: nn.Module, norms: Sequence[_BatchNorm], inputs: Inputs, seed: int, draws: int = 4) -> None:
    """Gives batch norms the statistics of what they meet, as of any network that was trained: with those that they
    start from nothing in it is normalized, and a deep one overflows on its way back.
    """
    generator = torch.Generator().manual_seed(seed)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None  # the mean of all draws
    with torch.no_grad():
        for _ in range(draws):
            model(**{name: torch.randn(one.shape, generator=generator).to(one)
                     if isinstance(one, Tensor) and one.is_floating_point() else one for name, one in inputs.items()})
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


def value(output: Any) -> Tensor:
    """What is explained of any model's output: one number a row, an entry of the first floating tensor that has rows:
    logits, starts of answers, similarities, or states.
    """
    for name in ("logits", "start_logits", "logits_per_image", "prediction_logits", "last_hidden_state"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return _entry(found)
    leaves = torch.utils._pytree.tree_leaves(output)
    return _entry(next(one for one in leaves if isinstance(one, Tensor) and one.is_floating_point() and one.dim() > 1))


def _entry(found: Tensor) -> Tensor:
    """One entry of each row, at the last but second position where there are positions."""
    while found.dim() > 2:
        found = found[:, max(found.shape[1] - 2, 0)]
    return found[:, min(1, found.shape[1] - 1)] if found.dim() == 2 else found
