"""Cost of scoring all nodes or edges of GPT-2 small (random weights) by gradients, beside plain passes of the model.

Nodes are measured in two plain forwards and one backward; edges in a forward and backward of the clean and corrupted
inputs as one batch. Memory is the most that the process ever held, over what it held after the plain passes.
Run it as `python tests/bench/circuits.py [--pairs 8] [--tokens 16] [--repeats 5]`.
"""
from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
from cost import seconds
from torch import nn

from relprop.circuit import Task, circuit
from relprop.mediation import LogOdds
from relprop.subject import Subject

NODES = ("atp", "relp", "gim")
EDGES = ("eap", "relp", "gim", "clean-corrupted", "eap-ig")


def peak() -> float:
    """The most memory that this process ever held, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def passes(model: nn.Module, batches: list[dict], *, back: int) -> None:
    """A forward of each batch, and a backward to the embeddings of the last `back` of them."""
    for number, batch in enumerate(batches):
        wanted = number >= len(batches) - back
        with torch.set_grad_enabled(wanted):
            hooked = model.get_input_embeddings().register_forward_hook(
                lambda module, args, output, wanted=wanted: output.detach().requires_grad_(wanted))
            try:
                value = model(**batch).logits[:, -1, 7].sum()
            finally:
                hooked.remove()
            if wanted:
                value.backward()


def compared(name: str, plain: Callable[[], None], run: Callable[[], object], repeats: int) -> None:
    before = peak()
    count = len(run())
    found = [(seconds(plain), seconds(run)) for _ in range(repeats)]
    ratio, cost = statistics.median(b / a for a, b in found), statistics.median(a for a, _ in found)
    print(f"{name:28s} {count:6d}  x{ratio:.2f}  (plain {cost:.2f} s)  +{peak() - before:.2f} GiB", flush=True)


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--nodes", nargs="*", default=NODES)
    parser.add_argument("--edges", nargs="*", default=EDGES)
    options = parser.parse_args()
    torch.manual_seed(0)
    subject = Subject.from_module(transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().requires_grad_(False))
    ids = torch.randint(5, 1000, (options.pairs, options.tokens))
    other = ids.clone()
    other[:, 1] += 1
    clean, corrupted = ({"input_ids": one} for one in (ids, other))
    both = {"input_ids": torch.cat([ids, other])}
    task = Task("random", clean, corrupted, LogOdds([[7]] * options.pairs, [[9]] * options.pairs))
    for_nodes = lambda: passes(subject.model, [corrupted, clean], back=1)
    for_edges = lambda: passes(subject.model, [both], back=1)
    for plain in (for_nodes, for_edges):
        plain()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {options.pairs} pairs of {options.tokens} "
          f"tokens; {peak():.2f} GiB after plain passes")
    for method in options.nodes:
        for level in ("heads and mlps", "neurons"):
            compared(f"{method}, {level}", for_nodes, lambda m=method, at=level: circuit(subject, task, m, level=at),
                     options.repeats)
    for method in options.edges:
        compared(f"{method}, edges", for_edges, lambda m=method: circuit(subject, task, m, level="edges"),
                 options.repeats)


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s in all")
