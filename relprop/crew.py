"""The processes that share a piece of work."""
from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .subject import Subject

if TYPE_CHECKING:
    from accelerate import PartialState


@dataclass(frozen=True)
class Crew:
    """The processes that share the work: this one's number, how many there are, and the way to wait for all."""

    rank: int = 0
    size: int = 1
    state: PartialState | None = None

    @classmethod
    def gathered(cls, subject: Subject) -> Crew:
        """Those of `accelerate launch` or `torchrun`; this process alone without one.

        Raises: ImportError without accelerate under several processes.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls()
        from datetime import timedelta

        try:
            from accelerate import PartialState
        except ImportError as cause:
            raise ImportError("several processes are accelerate's; pip install accelerate") from cause
        # long, since the first to finish waits for the last
        state = PartialState(cpu=subject.device.type == "cpu", timeout=timedelta(days=30))
        return cls(state.process_index, state.num_processes, state)

    def wait(self) -> None:
        """Until every process is here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def summed(self, x: Tensor) -> Tensor:
        """The sum over the processes of their tensors of one shape and dtype, for each of them."""
        if self.state is None:
            return x
        from accelerate.utils import reduce

        return reduce(x.to(self.state.device), "sum").to(x.device)

    def agree(self, digest: str) -> bool:
        """Whether the processes have the same digest, of at most 16 hexadecimal figures."""
        each = torch.zeros(self.size, 2, dtype=torch.int64)
        each[self.rank] = torch.tensor([int(digest[:8], 16), int(digest[8:] or "0", 16)])
        each = self.summed(each)
        return bool((each == each[0]).all())
