"""What `import relprop` gives, and that it does not wait for anything."""
from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from types import ModuleType

import pytest

import relprop


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_light():
    heavy = "{'torch', 'transformers', 'timm', 'captum', 'matplotlib', 'numpy'}"
    assert python(f"import relprop, sys; print({heavy} & set(sys.modules))") == "set()"


@pytest.mark.parametrize("name", relprop.__all__)
def test_every_name_is_there(name):
    assert getattr(relprop, name) is not None
    assert name in dir(relprop)


@pytest.mark.parametrize("name", ["approximation", "attention"])
def test_a_package_is_imported_when_it_is_first_used(name):
    assert python(f"import relprop; print(relprop.{name}.__name__)") == f"relprop.{name}"


def test_the_names_are_listed_once_for_each_reader():
    assert set(relprop.__all__) == {*relprop._MODULE_OF, *relprop._MODULES}


def test_a_submodule_does_not_hide_its_function():
    """The import of relprop/load.py would set `relprop.load`, which is a function."""
    say = "print(*(type(getattr(relprop, name)).__name__ for name in ('load', 'explain')))"
    assert python(f"import relprop.load, relprop.explain; {say}; import relprop; {say}").split() == ["function"] * 4
    assert all(isinstance(import_module(f"relprop.{name}"), ModuleType) for name in ("load", "explain"))


def test_no_such_name():
    with pytest.raises(AttributeError, match="relprop has no 'expain'; it has .*explain"):
        relprop.expain  # noqa: B018
