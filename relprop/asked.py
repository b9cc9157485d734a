"""What is asked of a model's output: the explained value of each row, and what it is called."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .target import Targets
from .tokens import Batch


@dataclass
class Asked:
    """From the model's output to the explained values, (B,). Remembers what the prediction was, in `targets`, and the
    targets' `names`, so that every further call asks the same.
    """

    targets: Targets
    batch: Batch
    names: list[str] | None = None

    @property
    def ruled(self) -> bool:
        """Whether the rules of a composite hold for what the targets compute."""
        return self.targets.ruled

    def __call__(self, output: object) -> Tensor:
        if self.names is None:
            with torch.no_grad():
                self.targets = self.targets.fixed(output, self.batch)
                self.names = self.targets.names(output, self.batch)
        return self.targets.value(output, self.batch)

    def row(self, row: int, rows: int) -> Asked:
        """The same for one row alone."""
        return Asked(self.targets.take([row]), self.batch.take(torch.tensor([row])))
