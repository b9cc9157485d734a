"""Imports point one way. Reads every module of the package, runs none."""
from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "relprop"

# A room (a file or a folder of the package) may import from the lines above its own, and from within itself.
LEVELS = [
    ["errors", "kernel", "numerics", "search", "origin", "shard"],
    ["still"],
    ["address", "pictures"],
    ["tokens"],
    ["target", "result", "rows", "neutral", "pixels"],
    ["units", "family", "folding", "chat", "grid"],
    ["prompt"],
    ["sight"],
    ["fit"],
    ["ops"],
    ["composite", "division"],
    ["trace"],
    ["nn", "anatomy"],
    ["subject", "intervene"],
    ["asked", "crew", "memory", "posed"],
    ["run"],
    ["relevance", "pattern", "check"],
    ["latents", "positions"],
    ["attention", "approximation", "way"],
    ["baselines", "captum", "lrp"],
    ["view"],
    ["zoo"],
    ["data"],
    ["load"],
    ["decompose"],
    ["method"],
    ["explain", "mediation"],
    ["benchmark", "circuit", "estimate"],
    ["census"],
    ["cli", "quantus"],
    ["__init__", "__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
VIEW_SEES = {"errors", "result", "tokens"}  # so that a saved result can be drawn without its model
OPS_SEE = {"errors", "numerics"}

HEAVY = {
    "transformers", "timm", "captum", "matplotlib", "pandas", "sklearn", "scipy", "networkx", "accelerate",
    "torchvision",
}  # fmt: skip
ADAPTERS = {"captum": {"captum"}}  # subclass what they adapt to, and are imported by those who have it
TORCHLESS = {"__init__", "__main__", "cli", "errors", "search"}  # what `relprop --help` imports
INSIDE = {"__init__", "cli"}  # import our own modules inside functions: the lazy names and the commands
NOT_NOUNS = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}


@dataclass(frozen=True)
class Import:
    """One import: the module named, the names taken from it, and whether it runs when the file is imported."""

    module: str
    names: tuple[str, ...]
    line: int
    inside: bool
    typing: bool


def imports(source: str, module: str, is_package: bool) -> Iterator[Import]:
    """Every import of a module, relative ones resolved."""
    parts = module.split(".") if is_package else module.split(".")[:-1]
    for node, inside, typing in walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, (), node.lineno, inside, typing)
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level + 1] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            yield Import(full, tuple(alias.name for alias in node.names), node.lineno, inside, typing)


def walk(tree: ast.AST, inside: bool = False, typing: bool = False) -> Iterator[tuple[ast.AST, bool, bool]]:
    """Every node, whether it stands in a function, and whether only type checkers read it."""
    for node in ast.iter_child_nodes(tree):
        yield node, inside, typing
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guard = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        yield from walk(node, inside or function, typing or guard)


def rooms(found: Import) -> list[str]:
    """The rooms of our package that an import enters; `from . import x` and `from relprop import x` enter x."""
    first, *rest = found.module.split(".")
    if first != "relprop":
        return []
    if rest:
        return [rest[0]]
    return [name if name in LEVEL else "__init__" for name in found.names] or ["__init__"]


def faults(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of a module, one line each."""
    parts = module.split(".")
    room = parts[1] if len(parts) > 1 else "__init__"
    if room not in LEVEL:
        return [f"{module}: not in the table of levels of {Path(__file__).name}"]
    allowed = {"view": VIEW_SEES, "ops": OPS_SEE}.get(room)
    said = []
    for found in imports(source, module, is_package):
        where = f"{module}:{found.line}"
        if "*" in found.names:
            said.append(f"{where}: star import of {found.module}")
        for other in rooms(found):
            if other == room and len(parts) > (1 if is_package else 2):
                continue  # within a folder
            if other not in LEVEL:
                said.append(f"{where}: {other} is not in the table of levels")
            elif LEVEL[other] >= LEVEL[room]:
                said.append(f"{where}: {room} must not import {other}, which is not above it")
            elif allowed is not None and other not in allowed:
                said.append(f"{where}: {room} may see {', '.join(sorted(allowed))} only, not {other}")
            if found.inside and room not in INSIDE and not found.typing:
                said.append(f"{where}: {other} is imported inside a function")
        top = found.module.split(".")[0]
        runs = not found.inside and not found.typing
        if runs and (top in HEAVY - ADAPTERS.get(room, set()) or top == "torch" and room in TORCHLESS):
            said.append(f"{where}: {top} is imported when {module} is; import it in the function that uses it")
    return said


def modules() -> list[tuple[Path, str]]:
    files = sorted(PACKAGE.rglob("*.py"))
    return [(file, ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")) for file in files]


@pytest.mark.parametrize("file, module", modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_one_way(file, module):
    assert not faults(file.read_text(), module, is_package=file.name == "__init__.py")


def test_every_module_was_read():
    read = {module for _, module in modules()}
    assert {"relprop", "relprop.cli", "relprop.trace", "relprop.ops", "relprop.zoo.digits"} <= read
    there = {module.split(".")[1] for module in read if "." in module}
    assert there | {"__init__"} == set(LEVEL), "the table names what is not there"


def test_files_are_named_by_nouns():
    names = {file.stem for folder in (PACKAGE, ROOT / "tests", ROOT / "demos") for file in folder.rglob("*.py")}
    assert not names & NOT_NOUNS


@pytest.mark.parametrize(
    "module, source, fault",
    [
        ("relprop.trace", "from .relevance import propagate", "trace must not import relevance"),
        ("relprop.trace", "import relprop.cli", "trace must not import cli"),
        ("relprop.trace", "from . import cli", "trace must not import cli"),
        ("relprop.trace", "from relprop import explain", "trace must not import explain"),
        ("relprop.trace", "from relprop import something", "trace must not import __init__"),
        ("relprop.address", "from .tokens import Batch", "address must not import tokens"),
        ("relprop.ops.linear", "from ..composite import get", "ops must not import composite"),
        ("relprop.view.figure", "from ..subject import Subject", "view may see errors, result, tokens only"),
        ("relprop.relevance", "def run():\n    from .trace import Trace", "trace is imported inside a function"),
        ("relprop.trace", "if TYPE_CHECKING:\n    from .explain import Explanation", "trace must not import explain"),
        ("relprop.trace", "from torch import *", "star import of torch"),
        ("relprop.load", "import timm.models", "timm is imported when relprop.load is"),
        ("relprop.cli", "from torch import Tensor", "torch is imported when relprop.cli is"),
        ("relprop.cli", "try:\n    import torch\nfinally:\n    pass", "torch is imported when relprop.cli is"),
        ("relprop.captum", "import timm", "timm is imported when relprop.captum is"),
        ("relprop.helpers", "", "relprop.helpers: not in the table"),
        ("relprop.trace", "from .elsewhere import x", "elsewhere is not in the table"),
    ],
)
def test_a_bad_module_is_caught(module, source, fault):
    assert len(said := faults(source, module)) == 1 and fault in said[0], said


@pytest.mark.parametrize(
    "module, source, is_package",
    [
        ("relprop.trace", "import torch\nfrom .ops import table\nfrom .errors import UnruledOp", False),
        ("relprop.ops.linear", "from . import journal\nfrom .call import Call\nfrom relprop.ops import conv", False),
        ("relprop.ops", "from . import linear\nfrom .linear import epsilon", True),
        ("relprop.load", "def load():\n    from transformers import AutoModel", False),
        ("relprop.load", "if TYPE_CHECKING:\n    from transformers import AutoModel", False),
        ("relprop.captum", "from captum.attr import Attribution", False),
        ("relprop.cli", "def run():\n    import torch\n    from .explain import explain", False),
        ("relprop", "def __getattr__(name):\n    from .explain import explain", True),
    ],
)
def test_a_good_module_passes(module, source, is_package):
    assert faults(source, module, is_package=is_package) == []
