"""Cost of estimating the effect of every MLP neuron or head, in forward + backward passes of the same pairs.

A GPT-2 small with random weights, whose 36,864 neurons and 144 heads are ranked on pairs that differ in one token.
Run it as `python tests/bench/estimates.py [--pairs 8] [--tokens 16] [--repeats 5]`.
"""
from __future__ import annotations

import argparse
import statistics

import torch
from cost import Case, plain, seconds
from torch import Tensor

from relprop.approximation import METHODS, estimates
from relprop.intervene import parts
from relprop.subject import Subject

SITES = {"neurons": "L*.mlp.N*", "neurons at the last position": "L*.mlp.N*@-1", "heads": "L*.attn.H*",
         "heads' patterns": "L*.attn.H*.pattern"}


def logit(output: object) -> Tensor:
    return output.logits[:, -1, 7]


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=list(METHODS[:2]), choices=METHODS)
    options = parser.parse_args()
    torch.manual_seed(0)
    subject = Subject.from_module(transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().requires_grad_(False))
    ids = torch.randint(5, 1000, (options.pairs, options.tokens))
    other = ids.clone()
    other[:, 1] += 1
    base, counterfactual = (subject.prepare({"input_ids": one}) for one in (ids, other))
    known = parts(subject.model, base.args, base.take([0]).kwargs)
    one = Case(subject.model, (), dict(base.kwargs), logit)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {options.pairs} pairs of {options.tokens} "
          "tokens, ratio to forward + backward to the embeddings")
    for method in options.methods:
        for name, at in SITES.items():
            for parts_known in (known, None):
                run = lambda at=at, method=method, given=parts_known: estimates(
                    subject, base, counterfactual, logit, at=at, method=method, known=given)
                count = len(run())
                pairs = [(seconds(lambda: plain(one)), seconds(run)) for _ in range(options.repeats)]
                ratio, cost = statistics.median(b / a for a, b in pairs), statistics.median(a for a, _ in pairs)
                kept = "parts known" if parts_known else "parts found as well"
                print(f"{method:20s} {count:6d} {name:29s} x{ratio:.2f}  (plain {cost:.2f} s)  {kept}", flush=True)


if __name__ == "__main__":
    main()
