"""Makes the tables of architectures anew: every architecture of the installed transformers and timm is built, run and
explained, about ten minutes on two cores.

Run: python demos/census.py [--out FOLDER]. Writes assets/census.json and assets/census.md, and what `relprop models`
prints; the counts for the README are printed. One that was stopped goes on in FOLDER.
"""
import argparse
import json
from pathlib import Path

import relprop
from relprop.census import SHIPPED

ASSETS = Path(__file__).parents[1] / "assets"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder to which entries are written as they come")
    found = relprop.census(out=parser.parse_args().out, show_progress=True)
    found.save(ASSETS / "census.json")
    found.save(ASSETS / "census.md")
    SHIPPED.write_text(json.dumps(found.verdicts(), indent=0) + "\n", encoding="utf-8")
    print(found.written_counts(), found.summary(), sep="\n\n")


if __name__ == "__main__":
    main()
