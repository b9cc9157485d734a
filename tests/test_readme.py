"""What the README says runs, and its tables say what the code does."""
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def table(heading: str) -> list[list[str]]:
    """Rows of the first table of a section, without its head; cells stripped of Markdown."""
    section = README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_snippets_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "readme"}
    blocks = PYTHON.findall(README)
    assert len(blocks) >= 4
    for number, block in enumerate(blocks):
        start = README[: README.index(block)].count("\n")  # so that a traceback names the line of the README
        exec(compile("\n" * start + block, f"README.md, snippet {number}", "exec"), namespace)


def test_the_first_snippet_is_short_and_checks_itself():
    lines = [line for line in PYTHON.search(README)[1].splitlines() if line.strip()]
    assert len(lines) <= 10 and "r.ledger" in lines[-1] and lines[-1].startswith("assert ")


def test_composites_are_listed_with_what_they_conserve():
    from relprop import composite

    listed = {name: conservation for name, conservation, *_ in table("Composites")}
    assert listed == {name: composite.get(name).conservation for name in composite.NAMES}


def test_methods_are_listed():
    from relprop import composite
    from relprop.method import METHODS

    first, *others = [name for name, *_ in table("Methods")]
    assert first == "the composites above"
    assert {*composite.NAMES, *others} == set(METHODS) and len(others) == len(set(others))


def test_methods_of_circuits_are_listed():
    from relprop.circuit import METHODS

    assert {name for cell, *_ in table("Circuits") for name in re.findall(r"[\w-]+", cell)} == set(METHODS)


def test_measures_and_data_are_listed():
    from relprop.benchmark import CONTROLS, METRICS
    from relprop.data import MAKERS

    section = README.split("## Measure methods on your own model and data\n", 1)[1].split("\n## ", 1)[0]
    assert not {name for name in [*METRICS, *CONTROLS, *MAKERS] if f"`{name}`" not in section}


@pytest.mark.parametrize("name", ["vision", "text-movies", "text-sst"])
def test_tables_of_methods_are_those_that_were_measured(name):
    from relprop.result import Table
    from relprop.view.forest import markdown

    kept = Table.from_dict(json.loads((Path(__file__).parents[1] / "assets" / f"benchmark-{name}.json").read_text()))
    headers = [line.split(" | ")[1:-1] for line in README.splitlines() if line.startswith("| method |")]
    shown = {metric for names in headers for metric in names
             if {*names} <= {known["name"] for known in kept.metrics} and markdown(kept, names) in README}
    assert shown == {metric["name"] for metric in kept.metrics}


@pytest.mark.parametrize("verb", ["explain", "compare", "check", "benchmark", "mediate", "circuit", "models", "demo"])
def test_verbs_are_shown(verb):
    assert f"relprop {verb}" in README


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (Path(__file__).parents[1] / link).exists(), link
