"""Our Triton kernels in Triton's interpreter on toy shapes, judged like every row: `python -m ...interpreted`.

A process of its own, because Triton reads TRITON_INTERPRET when a kernel's module is imported. Prints JSON.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import torch

from benchmarks.kernels.cases import Case
from benchmarks.kernels.gate import Gate
from benchmarks.kernels.registry import IMPLEMENTATIONS
from benchmarks.kernels.shapes import CONTEXTS, SHAPES, Level, reduced

LEVELS: tuple[Level, ...] = ("mix", "op", "cross")


def check_interpreted() -> list[dict[str, Any]]:
    """Start the process and read its verdicts.

    Raises:
        RuntimeError: it ended with an error; the message holds its last lines.
    """
    command = [sys.executable, "-m", "benchmarks.kernels.interpreted"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the interpreter run failed: {done.stderr.strip()[-400:]}")
    return json.loads(done.stdout.splitlines()[-1])


def verdicts() -> list[dict[str, Any]]:
    shape = replace(reduced(SHAPES["E"], max_groups=2), counts=(3, 2))
    found = []
    for level in LEVELS:
        for context in CONTEXTS:
            case = Case(level, shape, context, trained=level != "mix")
            gate = Gate(case, device=torch.device("cpu"), dtype=torch.float32, backend="triton")
            ours = IMPLEMENTATIONS["ours"]
            verdict = gate.judge(ours, ours.build(level), full=False)
            found.append({"level": level, "context": context, "match": verdict.match, "why": verdict.why,
                          "errors": dict(verdict.errors)})  # fmt: skip
    return found


if __name__ == "__main__":
    print(json.dumps(verdicts()))
