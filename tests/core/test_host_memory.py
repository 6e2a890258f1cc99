"""Memory that was freed is the system's again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NUM_BLOCKS, BLOCK = 100, 4 * 1024**2

SCRIPT = f"""
import json, sys
import psutil, torch
from samtrain.core.host_memory import return_freed_blocks

done = return_freed_blocks() if sys.argv[1] == "with" else None
del_me = torch.ones({4 * BLOCK}, dtype=torch.uint8)  # glibc learns from the first large block that is freed
del del_me
before = psutil.Process().memory_info().rss
blocks, pins = [], []
for _ in range({NUM_BLOCKS}):
    blocks.append(torch.ones({BLOCK}, dtype=torch.uint8))
    pins.append(torch.ones(50_000, dtype=torch.uint8))  # stays, and keeps the heap from shrinking
del blocks
print(json.dumps([done, psutil.Process().memory_info().rss - before]))
"""


def grown(how: str) -> tuple[bool | None, int]:
    command = [sys.executable, "-c", SCRIPT, how]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    done, num_bytes = json.loads(out)
    return done, num_bytes


def test_freed_blocks_go_back_to_the_system() -> None:
    done, num_bytes = grown("with")
    if not done:
        pytest.skip("this C library has no mallopt")
    assert num_bytes < NUM_BLOCKS * BLOCK / 10
    assert grown("without")[1] > NUM_BLOCKS * BLOCK / 2  # what this is for
