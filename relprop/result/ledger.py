"""Where every unit of the explained value went: to the inputs, and to absorbers, each named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from . import archive
from .number import amount, percent


@dataclass(frozen=True, eq=False)
class Ledger:
    """The books of a run, one entry a row of the batch; all in the unit of the target.

    value = input + sum of absorbed, up to `residual`. `absorbed` has one entry a kind of absorber ("biases", "softmax",
    ...); `layers`, where asked for, the relevance that crosses each boundary between layers, by the boundary's name.
    `parts`, of inputs of several kinds, what each of them has of `input`, by its kind ("text", "image").

    >>> books = Ledger(torch.tensor([4.0]), torch.tensor([3.0]), {"biases": torch.tensor([1.0])})
    >>> print(books)
    value 4 | input 3 (75.0 %) | biases 1 (25.0 %) | error 0
    """

    value: Tensor  # (B,)
    input: Tensor  # (B,)
    absorbed: dict[str, Tensor]  # each (B,)
    layers: dict[str, Tensor] | None = None  # each (B,)
    parts: dict[str, Tensor] | None = None  # each (B,)

    def __post_init__(self) -> None:
        named = [*self.absorbed.items(), *(self.layers or {}).items(), *(self.parts or {}).items()]
        for name, entry in [("input", self.input), *named]:
            if entry.shape != self.value.shape or entry.ndim != 1:
                raise ValueError(
                    f"a ledger has one number a row: value is {tuple(self.value.shape)}, {name} {tuple(entry.shape)}"
                )

    @property
    def total_absorbed(self) -> Tensor:
        """What did not reach the inputs, (B,)."""
        return sum(self.absorbed.values(), torch.zeros_like(self.input))

    @property
    def residual(self) -> Tensor:
        """What no account holds, (B,): value - input - total_absorbed."""
        return self.value - self.input - self.total_absorbed

    @property
    def error(self) -> Tensor:
        """|residual| / |value|, (B,); zero where both are."""
        gap = self.residual.abs()
        return torch.where(gap == 0, gap, gap / self.value.abs())

    def row(self, row: int) -> Ledger:
        """The books of one row."""
        cut = lambda entries: {name: entry[row:][:1] for name, entry in entries.items()}  # -1 counts from the end
        return Ledger(
            self.value[row:][:1],
            self.input[row:][:1],
            cut(self.absorbed),
            None if self.layers is None else cut(self.layers),
            None if self.parts is None else cut(self.parts),
        )

    def table(self, row: int = 0) -> list[tuple[str, float, float]]:
        """Name, amount, and share of the value: the value, the input or its parts, each absorber, and the residual.

        Shares are NaN where the value is zero.
        """
        given = self.parts or {"input": self.input}
        entries = {"value": self.value, **given, **self.absorbed, "residual": self.residual}
        value = self.value[row].item()
        return [
            (name, entry[row].item(), entry[row].item() / value if value else float("nan"))
            for name, entry in entries.items()
        ]

    def __str__(self) -> str:
        lines = [self._cells(row) for row in range(len(self.value))]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = [
            " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join(rows)

    def _cells(self, row: int) -> list[str]:
        (_, value, _), *parts, _ = self.table(row)
        books = [f"{name} {amount(part)} ({percent(share)})" for name, part, share in parts]
        return [f"value {amount(value)}", *books, f"error {amount(self.error[row].item(), 2)}"]

    def tree(self) -> dict:
        """Plain data and tensors."""
        return {"value": self.value, "input": self.input, "absorbed": self.absorbed, "layers": self.layers,
                "parts": self.parts}

    def to_dict(self) -> dict:
        """JSON-able; `from_dict` is the way back."""
        return archive.plain(self.tree())

    @staticmethod
    def from_dict(data: Mapping) -> Ledger:
        """The ledger that `to_dict` wrote."""
        layers, parts = (data.get(name) and archive.tensors(data[name]) for name in ("layers", "parts"))
        return Ledger(
            archive.tensor(data, "value"), archive.tensor(data, "input"), archive.tensors(data["absorbed"]), layers,
            parts,
        )
