"""The README's table of vision methods: canvases with several digits, of which one is asked for and masked.

    python demos/benchmark_vision.py --out assets

writes benchmark-vision.csv, .json and .png and prints the table; a run that was stopped goes on from the shards in
--work. The rules of the default method were chosen on canvases of other seeds (1000 to 3000).
"""
import argparse
from pathlib import Path

from relprop.benchmark import Benchmark, benchmark
from relprop.composite import default
from relprop.data import digits
from relprop.view.forest import markdown

METHODS = [default("image"), "rollout", "raw-attention", "attention-gradcam", "input-x-gradient",
           "integrated-gradients", "transformer-attribution"]
PLACED = ["pixel-accuracy", "mean-iou", "mean-average-precision", "pointing-game", "relevance-mass", "relevance-rank",
          "class-mass"]
REMOVED = ["area", "positive-auc", "negative-auc", "deletion", "insertion"]
SEED = 7
ENDS = 4  # a digit covers a tenth of the patches: the first and last are taken out one by one


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--model", default="digits-vit")
    asked.add_argument("--count", type=int, default=520)  # so that the model is right on more than 500
    asked.add_argument("--methods", nargs="+", default=METHODS)
    asked.add_argument("--work", type=Path, default=Path("benchmark-vision"))
    asked.add_argument("--out", type=Path, default=Path("assets"))
    asked = asked.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    found = benchmark(asked.model, digits(asked.count, seed=SEED), methods=asked.methods, metrics=PLACED + REMOVED,
                      out=asked.work, count=None, ends=ENDS)
    save(found, asked.out / "benchmark-vision")


def save(found: Benchmark, path: Path) -> None:
    """The numbers, the figure, and on the screen the table."""
    found.table.to_csv(f"{path}.csv", float_format="%.6g")
    Path(f"{path}.json").write_text(found.to_json())
    found.show().savefig(f"{path}.png", dpi=110)
    print(f"\n{found.cells[0].rows} canvases")
    for names in (PLACED, REMOVED):
        print(f"\n{markdown(found, names)}")


if __name__ == "__main__":
    main()
