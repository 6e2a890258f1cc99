"""Correct first: a row whose epoch is not the set, or whose pictures are not these, has no speed.

Every key once, with its number of images; and the pixels of some samples, cut by the same crops, close to what PIL
makes of them decoded in full. "Close" is a mean difference of 1.5 of 255: decoding at reduced scale and OpenCV's
INTER_AREA differ by 0.7, a resize that skips pixels (INTER_LINEAR) by 2.4.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.data.corpus import Corpus
from benchmarks.data.squares import to_bytes, true_square

LARGEST_DIFFERENCE = 1.5  # mean over pixels and pictures, of 255


@dataclass(frozen=True)
class Verdict:
    """why: what is wrong; empty where nothing is. difference: mean over the pixels of the checked pictures, of 255."""

    why: str
    difference: float | None = None

    @property
    def is_ok(self) -> bool:
        return not self.why


class Gate:
    """The set's keys and counts, and the true pixels of `check_keys`."""

    def __init__(self, corpus: Corpus, *, num_checked: int = 12) -> None:
        index = corpus.index
        self.counts = {entry.key: entry.num_images for entry in index.entries}
        chosen = range(0, len(index), max(1, len(index) // num_checked))
        self.check_keys = [index.entries[i].key for i in chosen]
        self.true: dict[str, np.ndarray] = {}
        for i in chosen:
            record, images = index.read_sample(i)
            self.true[record.key] = np.stack([true_square(data, record.key, n) for n, data in enumerate(images)])

    def judge(self, found: dict[str, Any], pixels: Path) -> Verdict:
        """Of a child's answer to a `check` job and the file it wrote."""
        if why := self.wrong_keys(found["keys"], found["counts"]):
            return Verdict(why)
        differences = []
        with np.load(pixels) as seen:
            for key, true in self.true.items():
                if key not in seen:
                    return Verdict(f"{key}: its pixels were not kept")
                if seen[key].shape[0] != true.shape[0]:
                    return Verdict(f"{key}: {seen[key].shape[0]} pictures, {true.shape[0]} expected")
                for ours, expected in zip(seen[key], true):
                    differences.append(np.abs(to_bytes(torch.from_numpy(ours)) - expected).mean())
        difference = float(np.mean(differences))
        if not difference <= LARGEST_DIFFERENCE:
            return Verdict(f"pixels differ by {difference:.1f} of 255 on average", difference)
        return Verdict("", difference)

    def wrong_keys(self, keys: list[str], counts: list[int]) -> str:
        """What is wrong with an epoch's keys; empty where each is there once."""
        met = Counter(keys)
        missing, repeated = len(self.counts.keys() - met.keys()), sum(count - 1 for count in met.values())
        unknown = len(met.keys() - self.counts.keys())
        if missing or repeated or unknown:
            return f"of {len(self.counts)} samples {missing} missing, {repeated} repeated, {unknown} unknown"
        wrong = sum(self.counts[key] != count for key, count in zip(keys, counts))
        return f"{wrong} samples with a wrong number of images" if wrong else ""
