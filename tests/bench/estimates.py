"""Cost of estimating the effect of every MLP neuron or head, in forward + backward passes of the same pairs.

A GPT-2 small with random weights, whose 36,864 neurons and 144 heads are ranked on pairs that differ in one token.
Run it as `python tests/bench/estimates.py [--pairs 8] [--tokens 16] [--repeats 5]`. With `--ranks`: how well the
estimates rank the neurons and heads of trained models, by Spearman's correlation with their exact effects; of the
bundled `tasks-gpt2` and, with `--shared FOLDER`, of `models/stories260k` there.
"""
from __future__ import annotations

import argparse
import random
import statistics
from functools import partial
from pathlib import Path

import torch
from cost import Case, plain, seconds
from torch import Tensor

import relprop
from relprop.approximation import METHODS, agreement, estimated, estimates, relp
from relprop.intervene import parts
from relprop.mediation import Difference, LogOdds, Ratio, effects
from relprop.mediation.estimate import queries
from relprop.mediation.task import task
from relprop.subject import Subject

SITES = {"neurons": "L*.mlp.N*", "neurons at the last position": "L*.mlp.N*@-1", "heads": "L*.attn.H*",
         "heads' patterns": "L*.attn.H*.pattern"}


def logit(output: object) -> Tensor:
    return output.logits[:, -1, 7]


def tasks() -> tuple[Subject, dict[str, tuple]]:
    """The bundled model with pairs, (base, counterfactual, a, b), of who gives and of professions."""
    from relprop.zoo import tasks

    drawn, gives = random.Random(0), []
    for number in range(16):
        a, b, place, thing = tasks.scene(drawn, "test")
        text = partial(tasks.INDIRECT[number % len(tasks.INDIRECT)].format, a=a, b=b, place=place, object=thing)
        gives.append((text(giver=b), text(giver=a), f" {a}", f" {b}"))
    base, other, receivers, givers = map(list, zip(*gives))
    planted = tasks.planted()["professions"]
    people = [(text, name, "man" if planted[name] > 0 else "woman") for text in tasks.PROFESSIONS[:4]
              for name in list(planted)[::8]]
    said, opposite = ([text.format(profession=one[i]) for text, *one in people] for i in (0, 1))
    return relprop.load("tasks-gpt2"), {"who gives": (base, other, receivers, givers),
                                        "professions": (said, opposite, " she", " he")}


STORIES = (
    "The {} was very happy because", "A little {} went to the park and", "One day, the {} was sad because",
    "Once there was a {} who liked to play. The {} had a big dog. One day,", "There was a {} in the house. At night,",
    "Once upon a time, there was a little {}. One day,", "The {} saw a bird. When the bird flew away,",
    "A {} and a cat were friends. Every day")


def stories(folder: Path) -> tuple[Subject, dict[str, tuple]]:
    """A model of stories with pairs of a girl and a boy."""
    subject = relprop.load(folder / "models" / "stories260k")
    base, other = ([text.replace("{}", who) for text in STORIES] for who in ("girl", "boy"))
    she, he = (subject.tokenizer.convert_tokens_to_ids(f"\u2581{word}") for word in ("she", "he"))
    return subject, {"girl or boy": (base, other, she, he)}


def ranked(subject: Subject, base: list[str], other: list[str], outcome: object, sites: str) -> dict[str, list[float]]:
    """Spearman with the exact effects, by method: of 500 mediators drawn at random, three times, or of all."""
    exact = effects(subject, base, other, outcome, at=sites, resamples=1)
    wanted, found = exact.indirect.mean(1), {}
    draws = [torch.randperm(len(wanted), generator=torch.Generator().manual_seed(seed))[:500] for seed in range(3)]
    for name, composite in (("attribution", None), ("relevance", None), ("relevance (RelP)", relp())):
        asked = task(subject, base, other, outcome)
        value = lambda answers: outcome.value([one.double() for one in answers])
        made = estimated(subject.model, queries(asked), value, at=sites, method=name.split()[0], composite=composite)
        place = {address: number for number, address in enumerate(made.addresses)}
        mean = made.mean.double()[[place[one] for one in exact.mediators]]
        found[name] = [agreement(mean[draw], wanted[draw]).spearman for draw in draws]
    return found


def ranks(shared: Path | None) -> None:
    for subject, cases in [tasks(), *([stories(shared)] if shared else [])]:
        subject.model.double()
        for case, (base, other, a, b) in cases.items():
            for kind in (LogOdds, Ratio, Difference):
                for name, sites in (("neurons", "L*.mlp.N*"), ("heads", "L*.attn.H*")):
                    print(f"{subject.name}, {case}, {len(base)} pairs, {kind.__name__}, {name}:", flush=True)
                    for method, values in ranked(subject, base, other, kind(a, b), sites).items():
                        print(f"    {method:20s} {statistics.mean(values):.4f}  "
                              f"({', '.join(f'{value:.4f}' for value in values)})", flush=True)


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=list(METHODS[:2]), choices=METHODS)
    parser.add_argument("--ranks", action="store_true")
    parser.add_argument("--shared", type=Path)
    options = parser.parse_args()
    if options.ranks:
        return ranks(options.shared)
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
