"""The state of a checkpoint in host memory: training goes on from its own copy while this one is written.

Twelve bytes for every trainable element this rank owns (fp32 master, two moments), kept for the length of the run.
Page-locked where the state is on a GPU: copies run at the full speed of the link (no GPU has run this yet).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from samtrain.core.log import logger
from samtrain.engine.fragments import named_tensors
from samtrain.engine.zero import Fragment

# 1 GiB of float32. PyTorch rounds page-locked blocks up to a power of two: one of 80 GiB would take 128.
BLOCK_ELEMENTS = 2**28


class HostCopy:
    """Buffers for one rank's fragments.

    Args:
        fragments: those that will be copied, each time in this order.
        pin: page-lock the buffers; where the system refuses, ordinary memory serves, with a warning.
    """

    def __init__(self, fragments: Iterable[Fragment], *, pin: bool, block_elements: int = BLOCK_ELEMENTS) -> None:
        self._is_pinned = pin
        numels = {name: tensor.numel() for name, tensor in named_tensors(fragments)}
        self.tensors: dict[str, Tensor] = {}
        """Name in the file -> float32 on the host."""
        group: dict[str, int] = {}
        for name, numel in numels.items():
            if group and sum(group.values()) + numel > block_elements:
                self._add_block(group)
                group = {}
            group[name] = numel
        if group:
            self._add_block(group)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def take(self, fragments: Iterable[Fragment]) -> None:
        """Copy the fragments as they are now; when it returns they may change."""
        device = None
        for name, tensor in named_tensors(fragments):
            self.tensors[name].copy_(tensor, non_blocking=True)
            device = tensor.device
        if device is not None and device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    def _add_block(self, group: dict[str, int]) -> None:
        block = self._empty(sum(group.values()))
        self.tensors |= dict(zip(group, block.split(list(group.values()))))

    def _empty(self, numel: int) -> Tensor:
        if self._is_pinned:
            try:
                return torch.empty(numel, dtype=torch.float32, pin_memory=True)
            except RuntimeError as error:
                self._is_pinned = False
                logger.warning("checkpoints are copied to ordinary host memory, slower: %s", str(error).split("\n")[0])
        # Written once, so that the pages are there before training and not in the first save.
        return torch.empty(numel, dtype=torch.float32).zero_()
