"""Ops of the CPU plugin in an instruction set that is not the best one of this machine: a process has one, so each runs in its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def check_in_instruction_set(module: ModuleType, library: Path | str, instructions: str, **variables: str) -> None:
    """Run a module of tests/support as a script on `library`; its failure is the test's, with the end of what it printed."""
    command = [sys.executable, "-m", module.__name__, str(library)]
    environment = os.environ | {"QWEN_EXPORT_CPU_SET": instructions} | variables
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def has_amx() -> bool:
    """Whether this machine runs tiles of bytes and of bf16."""
    info = Path("/proc/cpuinfo")
    return info.exists() and {"amx_int8", "amx_bf16", "avx512_bf16"} <= set(info.read_text().split())
