"""Plain data with tensors in it, written as JSON or as safetensors and read back without loss, never by pickle.

JSON holds a tensor as nested lists; what is not float32 is named under "dtypes" beside it. A safetensors file holds the
tensors under their path ("ledger.absorbed.biases"), and all else as JSON in its header.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

FORMAT, VERSION = "relprop", 1
_DTYPES = "dtypes"
_BEGINNING = 200  # characters of a file, in which its kind is: `sealed` puts it there
_TENSOR = "tensor"  # in the header of safetensors: stands for the tensor of this name


def sealed(kind: str, tree: Mapping) -> dict:
    """The tree with what tells a reader, years later, what it is."""
    return {"format": FORMAT, "version": VERSION, "kind": kind, **tree}


def check(tree: object, kind: str) -> None:
    """Raises: ValueError for what is not a sealed tree of this kind and of a version known here."""
    if not holds(tree, kind):
        raise ValueError(f"this is a {tree.get('kind')!r}, not a {kind!r}")


def holds(tree: object, kind: str) -> bool:
    """Whether a sealed tree is of this kind.

    Raises: ValueError for what is not a sealed tree of a version known here.
    """
    if not isinstance(tree, Mapping) or tree.get("format") != FORMAT:
        raise ValueError('this is not a result of relprop (no "format": "relprop" in it)')
    if tree.get("version") != VERSION:
        raise ValueError(
            f"this result is of version {tree.get('version')!r} of the format, and this relprop reads "
            f"version {VERSION}; read it with the relprop that wrote it"
        )
    return tree.get("kind") == kind


def kind(path: str | PathLike) -> str | None:
    """What kind of tree a .json file of ours holds, by its beginning; None where that does not say."""
    path = Path(path)
    if path.suffix.lower() != ".json":
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        found = re.search(r'"kind":\s*"([^"]*)"', file.read(_BEGINNING))
    return found and found[1]


def plain(tree: Mapping, path: str = "") -> dict:
    """The tree with its tensors as nested lists, so that JSON can hold it.

    Raises: ValueError for NaN or inf, which JSON has no word for.
    """
    dtypes = {
        name: _name(value) for name, value in tree.items() if isinstance(value, Tensor) and value.dtype != torch.float32
    }
    found = {str(name): _plain(value, f"{path}.{name}" if path else str(name)) for name, value in tree.items()}
    return {**found, _DTYPES: dtypes} if dtypes else found


def tensor(tree: Mapping, name: str) -> Tensor:
    """A tensor of the tree, which `plain` may have made a list."""
    value = tree[name]
    if isinstance(value, Tensor):
        return value
    dtype = getattr(torch, tree.get(_DTYPES, {}).get(name, "float32"), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no dtype {tree[_DTYPES][name]!r}, as which {name!r} was written")
    return torch.tensor(value, dtype=dtype)


def tensors(tree: Mapping) -> dict[str, Tensor]:
    """A tree of nothing but tensors, by name."""
    return {name: tensor(tree, name) for name in tree if name != _DTYPES}


def same(one: object, other: object) -> bool:
    """Whether two trees are equal: keys, numbers, and tensors bit for bit, dtypes included."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return both and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):  # JSON makes lists of both
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def from_json(text: str) -> dict:
    """The tree of a strict JSON text.

    Raises: ValueError for what is not JSON, the words NaN and Infinity included.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError as cause:
        raise ValueError(f"this is not JSON: {cause}") from cause


def write(tree: Mapping, path: str | PathLike) -> None:
    """Writes the tree as a safetensors file."""
    from safetensors.torch import save

    found: dict[str, Tensor] = {}
    header = json.dumps(_lifted(tree, "", found), allow_nan=False)
    Path(path).write_bytes(
        save(found, metadata={FORMAT: header})
    )  # save_file would hide the file from all but its owner


def load(path: str | PathLike) -> dict:
    """The tree of a safetensors file.

    Raises: ValueError for a file that is not safetensors, or that someone else wrote.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(FORMAT)
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
    except SafetensorError as cause:
        raise ValueError(f"this is not a safetensors file: {cause}") from cause
    if header is None:
        raise ValueError("this is not a result of relprop (its header does not name relprop)")
    return _lowered(from_json(header), found)


def _plain(value: object, path: str) -> object:
    if isinstance(value, Tensor):
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{path} holds NaN or inf, which JSON has no word for; write safetensors instead")
        return value.tolist()
    if isinstance(value, Mapping):
        return plain(value, path)
    if isinstance(value, list | tuple):
        return [_plain(entry, path) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path} is {value}, which JSON has no word for")
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value)  # a dtype, a device, a path: provenance, for reading


def _lifted(value: object, path: str, found: dict[str, Tensor]) -> object:
    """The tree with references in the place of its tensors, which go to `found`."""
    if isinstance(value, Tensor):
        while path in found:  # a dot in a name can make two paths one
            path += "'"
        found[path] = (
            value.detach().cpu().clone(memory_format=torch.contiguous_format)
        )  # the format refuses shared memory
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        return {
            str(name): _lifted(entry, f"{path}.{name}" if path else str(name), found) for name, entry in value.items()
        }
    if isinstance(value, list | tuple):
        return [_lifted(entry, f"{path}.{i}", found) for i, entry in enumerate(value)]
    return _plain(value, path)


def _lowered(value: object, found: Mapping[str, Tensor]) -> object:
    if isinstance(value, Mapping):
        name = value.get(_TENSOR)
        if len(value) == 1 and isinstance(name, str) and name in found:
            return found[name]
        return {key: _lowered(entry, found) for key, entry in value.items()}
    if isinstance(value, list):
        return [_lowered(entry, found) for entry in value]
    return value


def _name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _refuse(word: str) -> None:
    raise ValueError(f"this is not strict JSON: it holds {word}")
