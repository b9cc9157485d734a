"""The README's table of text methods: passages of film reviews with human rationales, sentences with labels of words.

    python demos/benchmark_text.py --data ../shared/data/rationale_eval --out assets

writes benchmark-text-*.csv, .json and .png, numbers only, and prints the tables. The folder of the data holds
movies_test_passages.jsonl.gz and sst2_test_words.jsonl.gz; a run that was stopped goes on from the shards in --work.
"""
import argparse
from pathlib import Path

from relprop.benchmark import Benchmark, benchmark
from relprop.composite import default
from relprop.data import get
from relprop.view.forest import verdict

METHODS = [default("text"), "attnlrp", "rollout", "raw-attention", "attention-gradcam", "input-x-gradient",
           "integrated-gradients", "transformer-attribution"]
PERTURBED = ["area", "positive-auc", "negative-auc", "comprehensiveness", "sufficiency"]
TRUTH = {"movies": ["token-f1", "iou-f1", "auprc"], "sst": ["rank-correlation", "sign-agreement"]}
COUNT = {"movies": 830, "sst": 620}  # so that the model is right on more than 500 of each


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--data", default="../shared/data/rationale_eval")
    asked.add_argument("--model", default="reviews-bert")
    asked.add_argument("--sets", nargs="+", default=list(TRUTH), choices=TRUTH)
    asked.add_argument("--work", type=Path, default=Path("benchmark-text"))
    asked.add_argument("--out", type=Path, default=Path("assets"))
    asked = asked.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in asked.sets:
        data = get(f"{name}:{asked.data}", count=COUNT[name])
        data = data.take(sorted(range(len(data)), key=lambda row: len(data.examples[row].input)))  # little padding
        label = f"{Path(asked.model).name}-{name}"
        found = benchmark(asked.model, data, methods=list(dict.fromkeys(METHODS)), metrics=TRUTH[name] + PERTURBED,
                          out=asked.work / label, count=None)
        save(found, asked.out / f"benchmark-text-{label}")


def save(found: Benchmark, path: Path) -> None:
    """Mean and half the interval; "<" where the first method beats it, ">" where it beats the first, paired tests."""
    found.table.to_csv(f"{path}.csv", float_format="%.6g")
    Path(f"{path}.json").write_text(found.to_json())
    found.show().savefig(f"{path}.png", dpi=110)
    names, costs = [metric["name"] for metric in found.metrics], found.cost["relative"]
    print(f"\n{path.name}: {found.cells[0].rows} inputs, {found.about['groups']} groups\n")
    print(f"| method | {' | '.join(names)} | time |\n|{' --- |' * (len(names) + 2)}")
    marks = {"worse": " <", "better": " >", "": ""}
    for method in [*found.methods, *found.controls]:
        cells = [found.cell(name, method) for name in names]
        said = [f"{one.mean:.3f} ± {(one.high - one.low) / 2:.3f}{marks[verdict(found, one)]}" for one in cells]
        print(f"| `{method}` | {' | '.join(said)} | {f'{costs[method]:.1f}' if method in costs else ''} |")


if __name__ == "__main__":
    main()
