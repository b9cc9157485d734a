"""How time and memory of a map grow with length and depth, against the plain model's own forward + backward.

Run: python tests/bench/scaling.py [--methods attnlrp cp-lrp] [--repeats 3] [--no-check]
A Llama of 2 layers, 1,024 wide, is run on 128 to 4,096 tokens, and one that is 384 wide with 2 to 24 layers on 192:
wide enough that what a call costs in Python is little of it. The exponents are slopes of least squares in log-log, of
both runs on the same points, interleaved; memory is the peak of PyTorch's profiler. Ends with an error where an
exponent is more than 5 % beside the plain model's.
"""

import argparse
import math
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: its profiler talks

import torch  # noqa: E402
from cost import Case, _text, _transformers, explained, peak, plain, seconds  # noqa: E402

LENGTHS, DEPTHS = (128, 512, 2048, 4096), (2, 4, 8, 16, 24)
LAYERS, TOKENS = 2, 192
ALLOWED = 0.05


def case(layers: int, tokens: int, width: int) -> Case:
    model = _transformers("LlamaForCausalLM", vocab_size=1024, hidden_size=width, intermediate_size=8 * width // 3,
                          num_hidden_layers=layers, num_attention_heads=width // 64,
                          max_position_embeddings=max(LENGTHS))
    model.eval().requires_grad_(False)
    return Case(model, (), _text(model, 1, tokens) | {"use_cache": False}, lambda out: out.logits[:, -1, 7])


def slope(sizes: tuple[int, ...], values: list[float]) -> float:
    """The exponent: the slope of log value over log size."""
    x, y = ([math.log(v) for v in column] for column in (sizes, values))
    return statistics.linear_regression(x, y).slope


def exponents(sizes: tuple[int, ...], make: Callable[[int], Case], method: str, repeats: int,
              ) -> dict[str, tuple[float, float, float]]:
    """Of time and memory: the plain model's exponent, ours, and how far it is beside it."""
    found: dict[str, tuple[list[float], list[float]]] = {"time": ([], []), "memory": ([], [])}
    for size in sizes:
        one = make(size)
        runs = partial(plain, one), partial(explained, one, method, True)
        for run in runs:
            run()
        several = repeats if size < sizes[-1] else max(1, repeats // 2)
        pairs = [[seconds(run) for run in runs] for _ in range(several)]
        for which, run in enumerate(runs):
            found["time"][which].append(min(pair[which] for pair in pairs))
            found["memory"][which].append(peak(run))
    slopes = {what: [slope(sizes, values) for values in columns] for what, columns in found.items()}
    return {what: (a, b, b / a - 1) for what, (a, b) in slopes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["attnlrp"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-check", action="store_true", help="print alone")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; exponents, with the ledger")
    wrong = []
    for method in options.methods:
        for name, sizes, make in (("tokens", LENGTHS, lambda size: case(LAYERS, size, 1024)),
                                  ("layers", DEPTHS, lambda size: case(size, TOKENS, 384))):
            for what, (a, b, off) in exponents(sizes, make, method, options.repeats).items():
                print(f"{method:10s} {what:6s} over {sizes[0]} to {sizes[-1]} {name}: plain {a:.3f}, ours {b:.3f}, "
                      f"{off:+.1%}", flush=True)
                wrong += [f"{what} over {name} of {method}"] if abs(off) > ALLOWED else []
    if wrong and not options.no_check:
        sys.exit(f"more than {ALLOWED:.0%} beside the plain model's: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
