"""Which method to believe on pictures: maps of one digit among others, against its mask and by taking patches out.

    python demos/benchmark_vision.py [COUNT] [FOLDER]

Writes the table and its rows to FOLDER, from where it goes on if it was stopped, prints the table for the README, and
draws assets/benchmark-vision.png. The default method comes first and is what the others are tested against. Its rules
were chosen on canvases of other seeds (1000 to 2000).
"""
from __future__ import annotations

import shutil
import sys
from pathlib import Path

import relprop
from relprop.data import digits

COUNT = int(sys.argv[1]) if len(sys.argv) > 1 else 520  # of which the model reads about 500 right
FOLDER = Path(sys.argv[2] if len(sys.argv) > 2 else "benchmark-vision")
ASSETS = Path(__file__).parents[1] / "assets"
METHODS = ["attnlrp-vision", "rollout", "raw-attention", "attention-gradcam", "input-x-gradient",
           "integrated-gradients", "transformer-attribution"]
METRICS = ["pixel-accuracy", "mean-iou", "mean-average-precision", "pointing-game", "relevance-mass", "relevance-rank",
           "class-mass", "area", "positive-auc", "negative-auc", "deletion", "insertion"]

# A digit is about a tenth of the patches, so that the first and last of them are taken out one by one (`ends`).
found = relprop.benchmark("digits-vit", digits(COUNT, seed=7), methods=METHODS, metrics=METRICS, out=FOLDER, ends=4)

print(f"| | {' | '.join(f'`{name}`' for name in found.methods)} | {' | '.join(found.controls)} |")
print("| --- " * (1 + len(found.methods) + len(found.controls)) + "|")
for metric in METRICS:
    said = []
    for name in [*found.methods, *found.controls]:
        cell = found.cell(metric, name)
        mark = "" if cell.difference is None or cell.difference_low * cell.difference_high > 0 else " ="
        said.append(f"{cell.mean:.3f} ± {(cell.high - cell.low) / 2:.3f}{mark}")
    print(f"| {metric} | {' | '.join(said)} |")

if ASSETS.is_dir():
    found.show().savefig(ASSETS / "benchmark-vision.png", dpi=100)
    for suffix in ("csv", "json"):
        shutil.copy(FOLDER / f"table.{suffix}", ASSETS / f"benchmark-vision.{suffix}")
