"""What every test may count on: no downloads, the same random numbers, and `shared` data that is there or skipped."""
from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported, which reads it once
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def _gpu_or_skip(request):
    """Skips tests marked `gpu` on a machine without one."""
    if request.node.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny models: starting threads costs more than they save, and much more on a busy machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def seed() -> int:
    """Seeds torch and NumPy; the value is for generators of one's own."""
    import numpy
    import torch

    torch.manual_seed(0)
    numpy.random.seed(0)
    return 0


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real models, data and reference outputs beside the checkout, which the package itself does not need."""
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}: reference outputs, real models and data do not ship with relprop")
    return SHARED


@pytest.fixture(scope="session")
def architectures() -> dict:
    """What the census asks of transformers, by "task/family/class"."""
    from relprop.census import auto

    return {one.key.removeprefix("transformers/"): one for one in auto.architectures()}
