"""Cost of an exhaustive exact sweep over attention heads, in plain forwards of the same pairs, one for each head.

Run: python tests/bench/mediation.py [--at "L*.attn.H*"] [--pairs 8] [--tokens 16] [--batch-size 64]
GPT-2 small with random weights, pairs that differ in every token, the indirect effect on a ratio of two tokens'
probabilities. Everything that `effects` does is counted, from finding the heads to the intervals. Times are of the
processor, so that other programs on the machine do not count; memory is the most that the process ever held.
"""

import argparse
import resource
import statistics
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from relprop.mediation import Ratio, effects
from relprop.subject import Subject

GIB = 2**20  # ru_maxrss counts KiB


def forward_seconds(model: torch.nn.Module, ids: torch.Tensor, repeats: int) -> float:
    """Median processor time of the plain model on all pairs, as a user would call it."""
    found = []
    with torch.no_grad():
        for _ in range(repeats):
            start = time.process_time()
            model(input_ids=ids)
            found.append(time.process_time() - start)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", default="L*.attn.H*")
    parser.add_argument("--kind", nargs="+", default=["total", "indirect"])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--repeats", type=int, default=1, help="forwards and sweep in turn; the best ratio counts")
    options = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    base, other = torch.randint(5, 5000, (2, options.pairs, options.tokens))
    subject = Subject.from_module(model)
    before = forward_seconds(model, base, 7)
    alone = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB
    measured = []
    for _ in range(options.repeats):
        start = time.process_time()
        found = effects(subject, base, other, Ratio(11, 12), at=options.at, kind=options.kind,
                        batch_size=options.batch_size)
        seconds, after = time.process_time() - start, forward_seconds(model, base, 7)
        measured.append((seconds / statistics.mean([before, after]), seconds, statistics.mean([before, after])))
        before = after
    _, seconds, plain = min(measured)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB
    many = len(found.mediators)
    print(f"{options.at}: {many} mediators, {options.pairs} pairs of {options.tokens} tokens")
    print(f"effects {seconds:.2f} s, one forward {plain:.3f} s, ratio to {many} forwards {seconds / many / plain:.3f}")
    print(f"peak memory {peak:.2f} GiB, {alone:.2f} GiB with the model and plain forwards alone")


if __name__ == "__main__":
    main()
