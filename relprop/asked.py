"""What is asked of a model's output: the explained value of each row, and what it is called."""
from __future__ import annotations

from dataclasses import dataclass, field, replace

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
    each: dict[int, Asked] = field(default_factory=dict, repr=False)

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
        self.each[row] = Asked(self.targets.take([row]), self.batch.take(torch.tensor([row])))
        return self.each[row]

    def gather(self) -> None:
        """Takes over what the rows were found to ask for, where they were all asked apart, and this never was."""
        if self.names is None:
            own = [self.each[row] for row in range(self.batch.runs)]
            self.names = [one.names[0] for one in own]
            self.targets = replace(self.targets, targets=tuple(one.targets.targets[0] for one in own))
