"""Scripts that are stopped in the middle, the hard way, or run by several processes."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def killed(script: str | Path, far_enough: Callable[[], bool], **environment: str) -> None:
    """Runs the script until it is far enough, and kills it then. Fails if it ends by itself, or takes minutes."""
    process = subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, env=os.environ | environment)
    try:
        deadline = time.time() + 120
        while not far_enough():
            assert process.poll() is None, process.stderr.read().decode()
            assert time.time() < deadline
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def together(script: str | Path, processes: int = 2) -> None:
    """Runs the script by several processes of `accelerate launch`, and fails if one does. With `--multi_gpu`: without,
    it starts a single process where there are no GPUs, whatever it is asked for, and with `--cpu` everywhere.
    """
    run = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
           "--main_process_port", "0", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
           script]
    made = subprocess.run(run, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert made.returncode == 0, made.stderr
