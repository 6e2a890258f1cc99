"""DeepSpeed ZeRO-3 behind a small door; the only module that imports deepspeed.

A parameter of n elements lives on W ranks as W equal fragments of ceil(n / W) elements (the last one padded):
rank r owns elements [r * ceil(n / W), min(n, (r + 1) * ceil(n / W))). The rank that owns a fragment of a
trainable parameter also owns its fp32 master copy and Adam's two moments.

Frozen towers may be `replicated`: each rank then holds them as a fragment over a group of its own (W = 1),
marked persistent, so that neither a call nor an optimizer step communicates them. They are still parameters of
the module, and still inside DeepSpeed's bookkeeping.

DeepSpeed's own checkpoints are not used (see `checkpoint.py`); its internals are touched in `Engine.fragments`,
`Engine.adopt_fragments` and the private functions below it, nowhere else. Written against deepspeed 0.19.8.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from samtrain.core.batch import PackedBatch
from samtrain.core.errors import ConfigError
from samtrain.engine.options import TrainOptions

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def init_distributed(device: torch.device, *, timeout_seconds: float = 600.0) -> None:
    """Join the process group (gloo on the CPU, nccl on CUDA), or reuse the one that exists.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are read where they are set; without them the process is alone.
    The group waits a minute longer than the watchdog, so that a hang is reported by the one that knows more.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    # torch >= 2.13 deprecates calls that deepspeed makes at every step; a user can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\.")
    if device.type == "cpu":
        # Its compilation takes one to two minutes and changes no result.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "nccl"
        timeout = timedelta(seconds=timeout_seconds + 60)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)


def deepspeed_config(options: TrainOptions, *, device: torch.device) -> dict[str, Any]:
    """The DeepSpeed configuration of these options.

    Accumulation is 1 and the boundary is set by hand at every micro-batch: the number of micro-batches varies from
    step to step, and `step.py` normalises the loss itself.
    """
    zero = options.zero
    # Alone, a gathered parameter is a view of its only fragment: keeping it costs nothing and saves a synchronisation.
    is_alone = dist.get_world_size() == 1 and zero.offload != "all"
    section: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": zero.overlap_comm,
        "contiguous_gradients": True,
        "reduce_bucket_size": zero.reduce_bucket_size,
        "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
        "stage3_max_reuse_distance": zero.max_reuse_distance,
        "stage3_param_persistence_threshold": 2**62 if is_alone else zero.param_persistence_threshold,
    }
    offload = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if zero.offload != "none":
        section["offload_optimizer"] = dict(offload)
    if zero.offload == "all":
        section["offload_param"] = dict(offload)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": options.max_grad_norm,
        "bf16": {"enabled": options.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": section,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeedCPUAdam compiles for two minutes; torch's AdamW does not
        "steps_per_print": None,
    }


def partitioned_construction(
    options: TrainOptions, *, device: torch.device | None = None
) -> Callable[[], AbstractContextManager]:
    """A factory of contexts in which every new module's parameters are partitioned as soon as they are made.

    `init_distributed` comes first. Parameters get the dtype of `options.precision`.
    """
    import deepspeed

    config = deepspeed_config(options, device=device or _default_device())
    return lambda: deepspeed.zero.Init(config_dict_or_path=config, dtype=DTYPES[options.precision])


def gathered(params: list[nn.Parameter], *, modifier_rank: int | None = None) -> AbstractContextManager:
    """The `Gather` convention: `params` are whole inside; with `modifier_rank` that rank's writes are kept on all."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(params, modifier_rank=modifier_rank)


def consolidated(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Every parameter and persistent buffer, one at a time: (name, whole tensor on the CPU on rank 0, else None).

    All ranks must iterate to the end. Tensors have the model's dtype; tied parameters come once.
    """
    is_main = dist.get_rank() == 0
    for name, parameter in module.named_parameters():
        with gathered([parameter]):
            whole = parameter.detach().to("cpu", copy=True) if is_main else None
        yield name, whole
    for prefix, submodule in module.named_modules():
        for name, buffer in submodule.named_buffers(recurse=False):
            if name not in submodule._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer.detach().to("cpu", copy=True) if is_main else None


@dataclass(frozen=True)
class Fragment:
    """What this rank owns of one trainable parameter: elements start:stop of its flat form.

    master, exp_avg, exp_avg_sq: [stop - start] float32, views of the optimizer's memory; empty where the parameter
    has fewer elements than there are ranks before this one.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Engine:
    """A module under ZeRO-3 with AdamW, driven by `step.py`.

    The module's output must be a dictionary-like object (such as transformers' ModelOutput) with `loss_sum`:
    DeepSpeed finds tensors inside dictionaries and tuples, and gathers nothing for others in the backward pass.
    """

    def __init__(self, deepspeed_engine: Any, *, options: TrainOptions, device: torch.device) -> None:
        self._engine = deepspeed_engine
        self._zero: Any = deepspeed_engine.optimizer
        self.options = options
        self.device = device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def forward(self, batch: PackedBatch) -> Any:
        """The module's output for a batch that is on `device`."""
        return self._engine(**batch.model_inputs())

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the loss's gradients, averaged over ranks, to this rank's fragments; `is_last` before a step."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        """Clip by the global norm and update; where the norm is not finite, drop the gradients and change nothing."""
        self._engine.step()

    @property
    def has_overflowed(self) -> bool:
        """True where the last step had a norm that was not finite, on every rank alike; nothing was applied."""
        return bool(self._zero.overflow)

    @property
    def grad_norm(self) -> float:
        """Global 2-norm of the last step's gradients, before clipping."""
        return float(self._engine.get_global_grad_norm())

    def discard_gradients(self) -> None:
        """Forget what backward accumulated: the next backward overwrites instead of adding."""
        self._zero.zero_grad()

    def set_learning_rate(self, factor: float) -> None:
        """Scale every group's own rate by `factor` for the next step."""
        for group in self._zero.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def learning_rates(self) -> dict[str, float]:
        """The rate of every parameter group now, by the group's name."""
        return {group["name"]: group["lr"] for group in self._zero.param_groups}

    # Fragments: what checkpoints are made of.

    def fragments(self) -> Iterator[Fragment]:
        """This rank's fragment of every trainable parameter, in the module's order."""
        for name, parameter in _named_parameters(self.module, trainable=True):
            group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            flat = self._zero.fp32_partitioned_groups_flat[group]
            state = self._zero.optimizer.state[flat]
            start, stop = owned_range(parameter.ds_numel, rank=self.rank, world_size=self.world_size)
            master, exp_avg, exp_avg_sq = (
                tensor.detach().narrow(0, offset, stop - start)
                for tensor in (flat, state["exp_avg"], state["exp_avg_sq"])
            )
            yield Fragment(name, tuple(parameter.ds_shape), start, stop, master, exp_avg, exp_avg_sq)

    def adopt_fragments(self, *, optimizer_step: int) -> None:
        """Make what was written into `fragments()` take effect: Adam's counters, and the module's own parameters."""
        for flat in self._zero.fp32_partitioned_groups_flat:
            self._zero.optimizer.state[flat]["step"].fill_(float(optimizer_step))
        self._zero._partition_all_parameters()  # whole copies are stale; the next forward gathers new ones
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)

    def optimizer_step(self) -> int:
        """How many updates Adam has made."""
        steps = {int(self._zero.optimizer.state[flat]["step"]) for flat in self._zero.fp32_partitioned_groups_flat}
        assert len(steps) == 1, f"Adam's counters disagree: {steps}"
        return steps.pop()

    def frozen_checksums(self) -> dict[str, tuple[float, float]]:
        """Sum and sum of absolute values, in float64, of every frozen parameter; equal on all ranks (a collective)."""
        names, rows = [], []
        for name, parameter in _named_parameters(self.module, trainable=False):
            start, stop = owned_range(parameter.ds_numel, rank=self.rank, world_size=self.world_size)
            held = parameter.ds_tensor.detach()
            is_replica = parameter.ds_zero_partition_world_size == 1
            mine = held[start:stop] if is_replica else held[: stop - start]
            # In pieces: a float64 copy of a whole embedding would be four times its size.
            pieces = [piece.to(self.device, torch.float64) for piece in mine.split(2**22) if len(piece)]
            total = sum((piece.sum() for piece in pieces), torch.zeros((), dtype=torch.float64, device=self.device))
            absolute = sum((piece.abs().sum() for piece in pieces), torch.zeros_like(total))
            names.append(name)
            rows.append(torch.stack([total, absolute]))
        if not rows:
            return {}
        table = torch.stack(rows)
        dist.all_reduce(table)
        return {name: (row[0], row[1]) for name, row in zip(names, table.tolist())}


def initialize(
    module: nn.Module, *, options: TrainOptions, parameter_groups: list[dict[str, Any]], device: torch.device
) -> Engine:
    """Put `module` under ZeRO-3 with AdamW.

    Args:
        module: made under `partitioned_construction`, or plain (rank 0's values then count everywhere).
        parameter_groups: from `optimizer.build_parameter_groups`.
    """
    import deepspeed

    if not parameter_groups:
        raise ConfigError("nothing trains: every part is frozen; unfreeze one under `model:`")
    config = deepspeed_config(options, device=device)
    if any(not hasattr(parameter, "ds_id") for parameter in module.parameters()):
        deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=DTYPES[options.precision])
    for submodule in module.modules():
        if getattr(submodule, "is_gathered_whole", False):  # a compiled one: no hooks inside it
            deepspeed.utils.set_z3_leaf_module(submodule, True)
    frozen = [parameter for _, parameter in _named_parameters(module, trainable=False)]
    # With offload: all, parameters live on the host, and only a partition is worth keeping there.
    is_replicated = (
        options.zero.frozen_towers == "replicated" and options.zero.offload != "all" and dist.get_world_size() > 1
    )
    if is_replicated and frozen:
        _replicate(frozen)
    optimizer = torch.optim.AdamW(
        parameter_groups,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        # Fused: no temporary copies of the flat fp32 partition.
        fused=device.type == "cuda" and options.zero.offload == "none",
    )
    deepspeed_engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    if is_replicated:
        kept = {id(parameter) for parameter in deepspeed_engine.optimizer.persistent_parameters}
        deepspeed_engine.optimizer.persistent_parameters.extend(p for p in frozen if id(p) not in kept)
    _allocate_optimizer_state(deepspeed_engine.optimizer)
    return Engine(deepspeed_engine, options=options, device=device)


def owned_range(numel: int, *, rank: int, world_size: int) -> tuple[int, int]:
    """Elements [start, stop) of a flat parameter that `rank` owns; start == stop where it owns none."""
    size = -(-numel // world_size)
    return min(rank * size, numel), min((rank + 1) * size, numel)


def _named_parameters(module: nn.Module, *, trainable: bool) -> list[tuple[str, Any]]:
    """Typed as Any for the `ds_` attributes that DeepSpeed adds."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad == trainable]


def _replicate(parameters: list[Any]) -> None:
    """Move partitioned parameters to a partition over one rank: this one, which then holds all of each.

    At the end of a step DeepSpeed releases every parameter and gathers the persistent ones again; over a group of
    one rank both only move a pointer.
    """
    # Only the member takes part in making its group: with the default every rank would make one group per rank.
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    for parameter in parameters:
        parameter.all_gather()
        parameter.ds_process_group = alone
        parameter.ds_zero_partition_rank, parameter.ds_zero_partition_world_size = 0, 1
        parameter.ds_persist = True
        parameter.ds_tensor = None
        parameter.partition()


def _allocate_optimizer_state(zero_optimizer: Any) -> None:
    """Adam's state, which torch makes at the first update only: a checkpoint may come first, and memory be short."""
    for flat in zero_optimizer.fp32_partitioned_groups_flat:
        step_device = flat.device if zero_optimizer.optimizer.defaults["fused"] else torch.device("cpu")
        zero_optimizer.optimizer.state[flat] = {
            "step": torch.zeros((), dtype=torch.float32, device=step_device),
            "exp_avg": torch.zeros_like(flat, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
        }


def _default_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
