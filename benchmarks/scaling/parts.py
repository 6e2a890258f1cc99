"""How long a GPU takes for a step's parts: as benchmarks.train has measured it, else as a roofline predicts it.

The prediction: a part's real work at the matmul rate, of which a share is assumed to be reached. Micro-batches of 16
samples are far above the ridge of an H200 (184 operations a byte of weights), so arithmetic decides and not bandwidth.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = ("vision", "qformer", "language_model")

PEAK = 989e12  # H200, dense bf16, data sheet: what MFU is counted against
ROOF = 790e12  # an H200's matmul of 8192 x 8192 x 8192 random bf16
# Assumed shares of the roof: large GEMMs with norms, activations and attention between them; many small ones.
REACHED = {"vision": 0.60, "qformer": 0.30, "language_model": 0.70}

# Share of a part's real work (forward and backward) that is its forward pass.
FORWARD_SHARE = {
    "frozen": {"vision": 1.0, "qformer": 0.6, "language_model": 1 / 2},
    "lora": {"vision": 1.0, "qformer": 1 / 3, "language_model": 1 / 2},
    "full": {"vision": 1.0, "qformer": 1 / 3, "language_model": 1 / 3},
}


@dataclass(frozen=True)
class PartSeconds:
    """mfu: part -> share of `peak` (FLOP/s) that its real work reaches. source: where that is from."""

    mfu: dict[str, float]
    peak: float
    source: str
    is_measured: bool = False

    def of(self, part: str, flops: float) -> float:
        return flops / (self.mfu[part] * self.peak)

    def describe(self) -> str:
        shares = ", ".join(f"{part} {100 * value:.0f} %" for part, value in self.mfu.items())
        return f"{self.source}; of {self.peak / 1e12:.0f} TFLOP/s: {shares}"


def predicted() -> PartSeconds:
    shares = ", ".join(f"{100 * share:.0f}" for share in REACHED.values())
    return PartSeconds(
        {part: share * ROOF / PEAK for part, share in REACHED.items()},
        PEAK,
        f"PREDICTED by a roofline, not measured: {ROOF / 1e12:.0f} TFLOP/s of matmul, {shares} % of it assumed",
    )


def measured(files: Iterable[Path]) -> dict[tuple[str, str], PartSeconds]:
    """(shape, what trains) -> from the breakdown of ours, of the files that a GPU has made; later files win."""
    found = {}
    for path in files:
        content = json.loads(path.read_text())
        if content["header"]["gpu"] is None:
            continue
        for table in content["tables"]:
            ours = next(row for row in table["rows"] if row["name"] == "ours")
            if "breakdown" in ours and (table["text"], table["context"]) == ("mini", "others"):
                found[table["shape"], table["train"]] = _of_table(table, ours, content["header"])
    return found


def _of_table(table: dict[str, Any], row: dict[str, Any], header: dict[str, Any]) -> PartSeconds:
    """The share of the peak that each part reached; head, loss and the rest of the step count as the LLM's.

    Under gradient checkpointing the LLM's time holds its forward pass twice: the study adds that itself, so here it
    counts as work.
    """
    times, work = row["breakdown"]["parts"], row["work"]
    peak = header["peak_tflops"] * 1e12
    rest = sum(times[name] for name in ("llm", "head", "loss", "other"))
    groups = {
        "vision": (work["vision"], times["vision"]),
        "qformer": (work["qformer"], times["qformer"]),
        "language_model": (work["llm"] + work["head"], rest),
    }
    mfu = {part: flops / (milliseconds / 1e3) / peak for part, (flops, milliseconds) in groups.items()}
    if table["checkpointing"]:
        mfu["language_model"] *= 1 + FORWARD_SHARE[table["train"]]["language_model"]
    return PartSeconds(mfu, peak, f"measured on {header['gpu']}, commit {header['commit'][:12]}", is_measured=True)
