"""Cost of a map against the plain model's forward + backward: ratios of time and of peak memory, in one process.

Run: python tests/bench/cost.py [--models vit-1 bert mixtral ...] [--methods attnlrp cp-lrp ...] [--repeats 5]
Time is the median of ratios of interleaved pairs, so that a drifting machine cancels. Memory is the peak that PyTorch's
profiler sees above what was there before, model included in neither. What is explained is the logit of one class or of
one next token.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: its profiler talks

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from relprop import composite  # noqa: E402
from relprop.explain import Explanation, explain  # noqa: E402
from relprop.relevance import Propagation, propagate  # noqa: E402

CASES = ("vit-1", "vit-8", "bert", "gpt2", "llama", "mixtral", "qwen3", "modernbert", "swin-1", "swin-8", "dinov2-1",
         "dinov2-8")


@dataclass
class Case:
    """A model, its input and the explained value."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Callable[[Any], Tensor]


def case(name: str) -> Case:
    """One of the models of the benchmark, with random weights, built from its config: about 100 million parameters."""
    torch.manual_seed(0)
    kind, _, images = name.partition("-")
    model = MODELS[kind]()
    if images:
        pixels = (torch.randn(int(images), 3, 224, 224),)
        return Case(model, pixels, {}, lambda out: getattr(out, "logits", out)[:, 7])
    if kind == "bert":
        return Case(model, (), _text(model, 8, 128), lambda out: out.logits[:, 1])
    if kind == "modernbert":
        return Case(model, (), _text(model, 2, 256), lambda out: out.logits[:, 1])
    return Case(model, (), _text(model, 2, 256) | {"use_cache": False}, lambda out: out.logits[:, -1, 7])


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False)


def _transformers(name: str, **config: Any) -> nn.Module:
    import transformers

    cls = getattr(transformers, name)
    return cls(cls.config_class(**config))


_LLAMA = dict(vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: _timm("vit_base_patch16_224"),
    "bert": lambda: _transformers("BertForSequenceClassification"),
    "gpt2": lambda: _transformers("GPT2LMHeadModel"),
    "llama": lambda: _transformers("LlamaForCausalLM", **_LLAMA),
    "mixtral": lambda: _transformers("MixtralForCausalLM", vocab_size=32000, hidden_size=512, intermediate_size=1024,
                                     num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4),
    "qwen3": lambda: _transformers("Qwen3ForCausalLM", **_LLAMA, num_key_value_heads=4, head_dim=128,
                                   tie_word_embeddings=True),
    "modernbert": lambda: _transformers("ModernBertForSequenceClassification", num_hidden_layers=12),
    "swin": lambda: _timm("swin_base_patch4_window7_224"),
    "dinov2": lambda: _transformers("Dinov2ForImageClassification", image_size=224, patch_size=14, num_labels=10)}


def _text(model: nn.Module, rows: int, tokens: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, 1000, (rows, tokens)), "attention_mask": torch.ones(rows, tokens).long()}


def plain(one: Case) -> None:
    """The model's own forward and backward to its input, parameters frozen."""
    args, kwargs, leaf = one.args, dict(one.kwargs), None
    if args:
        leaf = args[0].clone().requires_grad_()
        args = (leaf,)
    else:
        embedding = one.model.get_input_embeddings()
        leaves: list[Tensor] = []

        def grow(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[-1]

        handle = embedding.register_forward_hook(grow)
    try:
        value = one.value(one.model(*args, **kwargs))
    finally:
        if leaf is None:
            handle.remove()
    torch.autograd.grad(value.sum(), leaf if leaf is not None else leaves[0])


def explained(one: Case, method: str, ledger: bool) -> Propagation | Explanation:
    if method not in composite.NAMES:
        return explain(one.model, one.args[0] if one.args else one.kwargs, one.value, method=method)
    return propagate(one.model, one.args, one.kwargs, one.value, method, ledger=ledger)


def peak(run: Callable[[], None]) -> int:
    """Peak bytes that `run` holds at once, counted at PyTorch's allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(one: Case, method: str, ledger: bool, repeats: int) -> tuple[float, float, float]:
    """Median ratio of time, median plain seconds, ratio of peak memory."""
    runs = (lambda: plain(one)), (lambda: explained(one, method, ledger))
    for run in runs:
        run()
    pairs = [[seconds(run) for run in runs] for _ in range(repeats)]
    memory = peak(runs[1]) / peak(runs[0])
    return statistics.median(b / a for a, b in pairs), statistics.median(a for a, _ in pairs), memory


def rows(names: list[str], methods: list[str], repeats: int) -> Iterator[str]:
    for name in names:
        one = case(name)
        one.model.eval().requires_grad_(False)
        for method in methods:
            for ledger in (False, True) if method in composite.NAMES else (False,):
                ratio, base, memory = measure(one, method, ledger, repeats)
                kept = "map only"
                if ledger:
                    kept = f"with ledger, error {float(explained(one, method, True).ledger.error.max()):.0e}"
                yield f"{name:8s} {method:24s} time x{ratio:.2f}  memory x{memory:.2f}  (plain {base:.2f} s)  {kept}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--methods", nargs="+", default=[
        "attnlrp", "cp-lrp", "deep-taylor", "attnlrp-gamma", "transformer-attribution"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ratio to forward + backward to the input")
    for row in rows(options.models, options.methods, options.repeats):
        print(row, flush=True)


if __name__ == "__main__":
    main()
