"""A long text explained: time and peak memory of a fresh process, as the operating system counts it, and as estimated.

Run: python tests/bench/length.py [--tokens 8192] [--method attnlrp] [--ways kept checkpoint]
The model is a Llama of 12 layers, 768 wide, with 12 heads and random weights in float32; explained is the logit of one
next token. `kept` keeps what the way back needs, `checkpoint` runs each layer again. 8,192 tokens take minutes.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch


def run(tokens: int, method: str, checkpoint: bool) -> dict[str, float]:
    """One explanation in this process: seconds of a processor, GiB at the peak and before, error of the ledger."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import relprop

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=tokens, use_cache=False)).eval()
    ids = torch.randint(5, 32000, (1, tokens))
    relprop.explain(model, ids[:, :8], target=7, method=method, checkpoint=checkpoint)
    before = peak()
    expected = before + relprop.estimate(model, ids, 7, method=method, checkpoint=checkpoint).needed / 2**30
    start = time.process_time()
    found = relprop.explain(model, ids, target=7, method=method, checkpoint=checkpoint)
    return {"seconds": time.process_time() - start, "before": before, "peak": peak(), "expected": expected,
            "error": float(found.ledger.error.max())}


def peak() -> float:
    """GiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--method", default="attnlrp")
    parser.add_argument("--ways", nargs="+", default=["kept", "checkpoint"], choices=["kept", "checkpoint"])
    parser.add_argument("--here", action="store_true", help="in this process, as JSON")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(run(options.tokens, options.method, options.ways == ["checkpoint"])))
        return
    for way in options.ways:
        command = [sys.executable, __file__, "--here", "--ways", way, "--tokens", str(options.tokens), "--method",
                   options.method]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(said.splitlines()[-1])
        print(f"{options.tokens} tokens, {options.method}, {way:10s} {found['seconds']:7.1f} s, peak "
              f"{found['peak']:.2f} GiB, estimated {found['expected']:.2f} (model and libraries "
              f"{found['before']:.2f}), ledger error {found['error']:.0e}", flush=True)


if __name__ == "__main__":
    main()
