"""What memory there is."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

_SAID = ("can't allocate memory", "not enough memory", "out of memory")  # RuntimeErrors of processors, other devices


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, which less work at once may mend.

    >>> out_of_memory(MemoryError()), out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: ..."))
    (True, True)
    >>> out_of_memory(RuntimeError("shapes differ"))
    False
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


def free(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where nobody says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    return min((known for known in (_available(), _left()) if known is not None), default=None)


def _available() -> int | None:
    """What the machine has, by Linux."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def _left() -> int | None:
    """What a container leaves of its own."""
    try:
        most, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return None if most == "max" else int(most) - int(used)
    except (OSError, ValueError):
        return None


def held_by(model: nn.Module) -> int:
    """Bytes of a model's weights and buffers, each memory once."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.device.type != "meta"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
