"""A rank of the comparison with DeepSpeed: counts what its collectives move; run by test_zero3.py as a script.

    python zero3_ranks.py RANK WORLD_SIZE PORT OUT

Frozen tower without a backward pass, a trained layer, a frozen layer that gradients pass through: every case of the
formula. The dispatcher sees each collective once, whoever calls it.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from samtrain.engine import zero
from samtrain.engine.optimizer import build_parameter_groups
from samtrain.engine.options import TrainOptions, ZeroOptions

THRESHOLD, MICRO_BATCHES, STEPS = 20, 2, 3
LAYERS = {"tower": (9, 14), "adapter": (14, 11), "decoder": (11, 7)}  # no size divides by the ranks


class Output(dict):
    loss_sum = property(lambda self: self["loss_sum"])


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, sizes in LAYERS.items():
            setattr(self, name, nn.Linear(*sizes))

    def forward(self, x: Tensor) -> Output:
        return Output(loss_sum=self.decoder(torch.tanh(self.adapter(self.tower(x)))).pow(2).sum())


class CountCollectives(TorchDispatchMode):
    """kind -> elements that one rank has in the end (gathers), or gives (reductions), over groups of several ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("c10d::"):
            kind = "gather" if "gather" in name else "reduce" if "reduce" in name else name
            flat = [t for t in tree_iter(args) if isinstance(t, Tensor)]
            self.elements[kind] += self._moved(kind, flat)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _moved(kind: str, tensors: list[Tensor]) -> int:
        """The largest tensor is the whole; the others are fragments of it."""
        sizes = [t.numel() for t in tensors if t.is_floating_point()]
        return max(sizes, default=0)


def main(rank: str, world_size: str, port: str, out: str) -> None:
    os.environ.update(RANK=rank, WORLD_SIZE=world_size, LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    device = torch.device("cpu")
    options = TrainOptions(
        precision="fp32",
        zero=ZeroOptions(
            frozen_towers="partitioned", param_persistence_threshold=THRESHOLD, max_reuse_distance=0,
            prefetch_bucket_size=0, reduce_bucket_size=1000,
        ),
    )  # fmt: skip
    zero.init_distributed(device)
    torch.manual_seed(0)
    with zero.partitioned_construction(options, device=device)():
        model = Small()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("adapter"))
    groups = build_parameter_groups(model.named_parameters(), options, lambda name: "projection")
    engine: Any = zero.initialize(model, options=options, parameter_groups=groups, device=device)
    seen = []
    for _ in range(STEPS):
        with CountCollectives() as counted:
            for i in range(MICRO_BATCHES):
                loss = engine._engine(torch.ones(3, 9)).loss_sum
                engine.backward(loss, is_last=i == MICRO_BATCHES - 1)
            before_step = dict(counted.elements)
            engine.step()
        seen.append({"passes": before_step, "step": dict(counted.elements)})
    if rank == "0":
        Path(out).write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
