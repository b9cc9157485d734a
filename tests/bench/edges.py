"""Cost of running circuits of edges of GPT-2 small (random weights), of exact effects and of a step of ACDC, in plain
forward passes of the same pairs, in the same process.

Circuits keep edges drawn at random; of exact edges and of ACDC a sample is run, spread over the layers. Times are of
the processor, memory is the most that the process ever held.
Run it as `python tests/bench/edges.py [--pairs 8] [--tokens 16] [--sample 12]`.
"""
from __future__ import annotations

import argparse
import resource
import statistics
import time

import torch
from cost import seconds
from transformers import GPT2Config, GPT2LMHeadModel

from relprop.circuit import Task
from relprop.circuit.piece import Piece, Pieces
from relprop.circuit.run import swept
from relprop.mediation import LogOdds
from relprop.mediation.task import ready
from relprop.subject import Subject


def timed(piece: Piece, cut: torch.Tensor) -> float:
    """Processor time of a run of circuits, for each."""
    start = time.process_time()
    piece.run(cut)
    return (time.process_time() - start) / len(cut)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("pairs", 8), ("tokens", 16), ("sample", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    clean, other = torch.randint(5, 5000, (2, options.pairs, options.tokens))
    task = Task("words", clean, other, LogOdds([11], [12])).prepared(Subject.from_module(model))
    with torch.no_grad():
        plain = statistics.median(seconds(lambda: model(input_ids=clean)) for _ in range(5))
    print(f"one forward of {options.pairs} x {options.tokens} tokens: {plain:.3f} s")
    with ready(model):
        start = time.process_time()
        swept(task, list(task.nodes("heads").values()))
        print(f"exact, 144 heads: {(time.process_time() - start) / plain:.0f} forwards")
        start = time.process_time()
        pieces = Pieces(task)
        piece = pieces.ready(pieces.rows[0])
        pieces.projections  # noqa: B018 - learned once
        print(f"made ready: {(time.process_time() - start) / plain:.1f} forwards")
        graph = pieces.wired.graph
        edges = graph.edges.nonzero()
        for kept in (200, 2000, 20_000):
            cut = graph.edges.T.repeat(4, 1, 1)
            for one in cut:
                chosen = edges[torch.randperm(len(edges))[:kept]]
                one[chosen[:, 1], chosen[:, 0]] = False
            print(f"a circuit of {kept} edges: {timed(piece, cut) / plain:.1f} forwards")
        sample = edges[torch.linspace(0, len(edges) - 1, options.sample).long()]
        alone, steps = [], []
        for source, destination in sample.tolist():
            cut = torch.zeros(piece.size, *graph.edges.T.shape, dtype=torch.bool)
            cut[:, destination, source] = True
            alone.append(timed(piece, cut))
            cut[:, destination + 1:] = graph.edges.T[destination + 1:] & (torch.rand(graph.edges.T.shape)
                                                                         [destination + 1:] < 0.95)
            steps.append(timed(piece, cut[:1]))
        each, step = sum(alone) / len(alone) / plain, sum(steps) / len(steps) / plain
        print(f"exact, an edge: {each:.2f} forwards, {len(edges)} of them {each * len(edges):.0f}")
        print(f"ACDC, an edge, 95 % of the later ones cut: {step:.2f} forwards")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f} GiB")


if __name__ == "__main__":
    main()
