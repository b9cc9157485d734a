"""What CD-T costs on GPT-2 small, in plain forward passes: `python tests/bench/decompose.py`.

One prompt of 16 tokens, random weights, float32: all 12 x 16 x 12 = 2,304 heads at positions, mean-ablated, to the
logits of two tokens at one position; and to two heads (a target round). The unit is a plain forward of a 64 x 16 batch,
measured before and after in the same process; a batch is 64 sources.
"""
from __future__ import annotations

import argparse
import os
import resource
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

from relprop import division  # noqa: E402
from relprop.decompose import Run, sources  # noqa: E402
from relprop.intervene import Mean  # noqa: E402

ROWS, TOKENS, END, NAMES = 64, 16, 14, (318, 257)
TARGETS = ("L8.attn.H3@14", "L6.attn.H9@10")


def seconds(run):
    """CPU seconds of a call, which other processes do not count in."""
    start = time.process_time()
    run()
    return time.process_time() - start


def main(layers: int, chunk: int | None, skip: int) -> None:
    """Prints the cost of a sweep and of a target round."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers)).eval()
    ids = torch.randint(50000, (ROWS, TOKENS))
    prompt = {"input_ids": ids[:1]}

    @torch.no_grad()
    def plain():
        model(ids)

    plain()
    before = seconds(plain)
    run = Run(model, (), prompt, division.get("cdt"), Mean({"input_ids": ids[:50]}, per_position=True), chunk=chunk)
    found = sources(run.placing, "heads at positions")
    found = sorted(found, key=run.depth)
    chunks = [found[start:start + 64] for start in range(0, len(found), 64)][skip // 2::skip]

    def score(output):
        picked = output.logits[:, END][:, list(NAMES)]
        return picked[:, 0] - picked[:, 1]

    looks = {target: place for target in TARGETS for _, place in run.placing.places(target)}
    run.prepare(found, looks)  # what is found out once: the means are given to the original, too
    sweep = seconds(lambda: [run.of(part, score) for part in chunks])
    middle = seconds(plain)
    round_ = seconds(lambda: [run.of(part, None, looks) for part in chunks])
    after = seconds(plain)
    unit = sorted([before, middle, after])[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"plain forward of {ROWS} x {TOKENS}: {before:.2f} {middle:.2f} {after:.2f} s")
    for what, cost in (("sweep to the logits", sweep), ("target round", round_)):
        print(f"{what}: {cost:.1f} s for {len(chunks)} of {-(-len(found) // 64)} batches of 64 sources, "
              f"{cost / unit / len(chunks):.2f} plain forwards a batch")
    print(f"peak memory of the process: {peak:.2f} GiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--chunk", type=int, default=64, help="sources that are carried at once")
    parser.add_argument("--skip", type=int, default=1, help="measure each so many-th batch")
    main(**vars(parser.parse_args()))
