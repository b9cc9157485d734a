"""What ablation says about a map: the target while units are removed, against random orders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from . import archive
from .number import amount, chance

LEVEL = 0.05
"""A p-value up to here counts as better than chance."""


@dataclass(frozen=True, eq=False)
class Curve:
    """The explained value while units are removed from the input, and how far the map's order is from chance.

    `morf` removes the most relevant first, `lerf` the least relevant first, `random` in N random orders. `area` lies
    between LeRF and MoRF, positive for a faithful map. `p_value` and `interval` (95 %, None for one row) are of the
    mean area over the rows. Values and areas are in the unit of the target. `forwards` is what it cost, `baseline` what
    stands for a removed unit.
    """

    fractions: Tensor  # (F,), from 0 to 1
    morf: Tensor  # (B, F)
    lerf: Tensor  # (B, F)
    random: Tensor  # (N, B, F)
    area: Tensor  # (B,)
    random_area: Tensor  # (N, B)
    p_value: float
    interval: tuple[float, float] | None
    forwards: int
    baseline: str
    value: Tensor  # (B,)

    def __post_init__(self) -> None:
        rows, steps = self.morf.shape
        orders = len(self.random)
        wanted = {
            "fractions": (steps,),
            "lerf": (rows, steps),
            "random": (orders, rows, steps),
            "area": (rows,),
            "random_area": (orders, rows),
            "value": (rows,),
        }
        for name, shape in wanted.items():
            if tuple(getattr(self, name).shape) != shape:
                found = tuple(getattr(self, name).shape)
                raise ValueError(f"{name} is {found}, but {shape} goes with a morf of {tuple(self.morf.shape)}")

    @property
    def better(self) -> bool:
        """Whether the map's order beats random orders: p_value <= LEVEL."""
        return self.p_value <= LEVEL

    @property
    def verdict(self) -> str:
        """One phrase: "better than chance (p = 0.048)", or "not better than chance (...)"."""
        return f"{'' if self.better else 'not '}better than chance ({chance(self.p_value)})"

    def summary(self) -> str:
        """One line: the verdict, the area with its interval, the areas of chance, and the cost."""
        spread = "" if self.interval is None else f" [{amount(self.interval[0], 3)}, {amount(self.interval[1], 3)}]"
        rows = f", mean of {len(self.area)} inputs" if len(self.area) > 1 else ""
        orders = self.random_area.mean(1)
        return (
            f"{self.verdict}: area {amount(self.area.mean().item(), 3)}{spread}{rows}; {len(orders)} random orders "
            f"{amount(orders.min().item(), 3)} to {amount(orders.max().item(), 3)}; removed: {self.baseline}; "
            f"{self.forwards} forwards"
        )

    def row(self, row: int) -> Curve:
        """The check of one row alone, with its own p-value, (1 + #{random >= area}) / (N + 1).

        `forwards` stays that of all rows.
        """
        cut = slice(row % len(self.area), row % len(self.area) + 1)
        at_least = int((self.random_area[:, cut] >= self.area[cut]).sum())
        return Curve(
            self.fractions,
            self.morf[cut],
            self.lerf[cut],
            self.random[:, cut],
            self.area[cut],
            self.random_area[:, cut],
            (1 + at_least) / (1 + len(self.random)),
            self.interval if len(self.area) == 1 else None,
            self.forwards,
            self.baseline,
            self.value[cut],
        )

    def tree(self) -> dict:
        """Plain data and tensors."""
        return dict(vars(self))

    def to_dict(self) -> dict:
        """JSON-able; `from_dict` is the way back."""
        return archive.plain(self.tree())

    @staticmethod
    def from_dict(data: Mapping) -> Curve:
        """The curve that `to_dict` wrote."""
        names = ("fractions", "morf", "lerf", "random", "area", "random_area", "value")
        interval = data["interval"] and tuple(data["interval"])
        return Curve(
            **{name: archive.tensor(data, name) for name in names},
            p_value=data["p_value"],
            interval=interval,
            forwards=data["forwards"],
            baseline=data["baseline"],
        )
