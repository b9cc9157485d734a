"""The README's table of text methods: passages of film reviews with human rationales, sentences with labels of words.

    python demos/benchmark_text.py --data ../shared/data/rationale_eval --out assets

writes numbers, benchmark-text-*.csv and .json and benchmark-text.png, and prints the tables. The folder of the data has
movies_test_passages.jsonl.gz and sst2_test_words.jsonl.gz; what was stopped goes on from the shards in --work.
"""
import argparse
from io import BytesIO
from pathlib import Path

from PIL import Image

from relprop import Benchmark, benchmark, composite, data
from relprop.view.forest import markdown

METHODS = dict.fromkeys([composite.default("text"), "attnlrp", "rollout", "raw-attention", "attention-gradcam",
                         "input-x-gradient", "integrated-gradients", "transformer-attribution"])
PERTURBED = ["area", "positive-auc", "negative-auc", "comprehensiveness", "sufficiency"]
TRUTH = {"movies": ["token-f1", "iou-f1", "auprc"], "sst": ["rank-correlation", "sign-agreement"]}
COUNT = {"movies": 400, "sst": 620}  # inputs drawn; those which the model gets wrong are left out


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, usual in (("data", "../shared/data/rationale_eval"), ("model", "reviews-bert"),
                          ("work", "benchmark-text"), ("out", "assets")):
        asked.add_argument(f"--{option}", default=usual)
    asked, pages = asked.parse_args(), []
    for name, metrics in TRUTH.items():
        drawn = data.get(f"{name}:{asked.data}", count=COUNT[name])
        drawn = drawn.take(sorted(range(len(drawn)), key=lambda row: len(drawn.examples[row].input)))  # little padding
        found = benchmark(asked.model, drawn, methods=list(METHODS), metrics=metrics + PERTURBED, count=None,
                          out=Path(asked.work) / f"{Path(asked.model).name}-{name}")
        write(found, Path(asked.out) / f"benchmark-text-{name}")
        found.show().savefig(page := BytesIO(), dpi=100)
        pages.append(Image.open(page))
    sheet = Image.new("RGB", (pages[0].width + pages[1].width, max(page.height for page in pages)), "white")
    for page, left in zip(pages, (0, pages[0].width)):
        sheet.paste(page, (left, 0))
    sheet.save(Path(asked.out) / "benchmark-text.png", optimize=True)


def write(found: Benchmark, path: Path) -> None:
    """The numbers, and on the screen the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found.table.to_csv(f"{path}.csv", float_format="%.6g")
    Path(f"{path}.json").write_text(found.to_json())
    print(f"\n{path.name}: {max(cell.rows for cell in found.cells)} of {found.about['rows']} inputs\n")
    print(markdown(found, [metric["name"] for metric in found.metrics]))


if __name__ == "__main__":
    main()
