"""Models written by hand for one test each, and the state of a model and of torch, which an explanation gives back."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from relprop.composite import Composite
from relprop.numerics import tolerance
from relprop.relevance import Propagation, propagate

F64 = torch.float64
D = 8


class Written(nn.Module):
    """A model whose forward is the given function of itself and its inputs, with two linear maps and a norm at hand."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)
        self.norm = nn.LayerNorm(D)
        for parameter in self.parameters():
            parameter.data.add_(torch.randn_like(parameter) / 10)
        self.steps = forward
        self.to(F64).eval()

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.steps(self, *inputs, **named)


def tokens(rows: int = 2, width: int = D) -> Tensor:
    """States (B, T, D)."""
    return torch.randn(rows, 5, width, dtype=F64, generator=torch.Generator().manual_seed(1))


def second(output: Tensor) -> Tensor:
    return output[:, 1]


def run(forward: Callable[..., Any], *inputs: Any, composite: str | Composite = "attnlrp", value: Any = second,
        named: dict[str, Any] | None = None, **options: Any) -> Propagation:
    model = forward if isinstance(forward, nn.Module) else Written(forward)
    found = propagate(model, inputs or (tokens(),), named or {}, value, composite, **options)
    assert all(r.abs().max() > 0 for r in found.relevance.values())
    return found


def closes(found: Propagation) -> bool:
    """Whether the books are as good as those of a float64 run have to be."""
    return bool((found.ledger.error <= tolerance(F64)).all())


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


# -- the state of a model, and of torch --------------------------------------------------------------------------------

def content(t: Tensor | None) -> Any:
    return None if t is None else (t.dtype, tuple(t.shape), t.detach().contiguous().numpy().tobytes())


def state(model: nn.Module) -> dict[str, Any]:
    """All that an explanation could leave changed in a model or in torch, comparable by `==`."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return {
        "tensors": {name: (id(t), t.requires_grad, content(t), content(t.grad), len(t._backward_hooks or ()))
                    for name, t in tensors},
        "modules": {name: (id(m), type(m), m.training, sorted(vars(m))) for name, m in model.named_modules()},
        "hooks": {f"{name}.{key}": list(hooks) if isinstance(hooks, Mapping) else hooks  # or transformers' own flag
                  for name, m in model.named_modules() for key, hooks in vars(m).items() if "hooks" in key},
        "attention": attention, "torch": torch_state()}


def torch_state() -> dict[str, Any]:
    cuda, modules = torch.backends.cuda, torch.nn.modules.module
    return {
        "grad": torch.is_grad_enabled(), "inference": torch.is_inference_mode_enabled(),
        "threads of the backward pass": torch._C._is_multithreading_enabled(),
        "anomaly": torch.is_anomaly_enabled(), "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(), "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        "function modes": torch._C._len_torch_function_stack(),
        "torch function": torch._C._get_torch_function_state() if hasattr(torch._C, "_get_torch_function_state") else 0,
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "kernels": (cuda.flash_sdp_enabled(), cuda.math_sdp_enabled(), cuda.mem_efficient_sdp_enabled()),
        "global hooks": [list(hooks) for name, hooks in vars(modules).items() if name.startswith("_global_")
                         and isinstance(hooks, dict)],
        "random numbers": content(torch.random.get_rng_state()), "number of threads": torch.get_num_threads()}


def lived_in(model: nn.Module) -> nn.Module:
    """The model as it is in the middle of someone's work: in train mode in parts, gradients, hooks, frozen weights."""
    parameters = list(model.parameters())
    modules = list(model.modules())
    model.train()
    for module in modules[1::3]:
        module.training = False
    for parameter in parameters[::2]:
        parameter.grad = torch.ones_like(parameter)
    for parameter in parameters[1::3]:
        parameter.requires_grad_(False)
    modules[-1].register_forward_hook(lambda module, args, output: None)
    modules[-2].register_forward_pre_hook(lambda module, args: None)
    return model
