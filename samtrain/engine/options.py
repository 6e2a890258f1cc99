"""The `train:` section of a recipe; Hugging Face names where a thing has one."""

from typing import Literal

from pydantic import Field, model_validator

from samtrain.core.options import Options


class ZeroOptions(Options):
    """DeepSpeed ZeRO-3; sizes in elements.

    max_reuse_distance: parameters that are used again within so many elements stay whole. Looking that far ahead
        costs the host minutes in the first steps of a small model of many modules: 0 there.

    frozen_towers: `partitioned` over the ranks, or `replicated` on each (no gather per call, more memory).
        With `offload: all` they are always partitioned.
    offload: keep the optimizer (and its fp32 weights), or all weights too, in host memory.
    """

    frozen_towers: Literal["partitioned", "replicated"] = "replicated"
    overlap_comm: bool = True
    reduce_bucket_size: int = Field(default=50_000_000, ge=1)
    prefetch_bucket_size: int = Field(default=50_000_000, ge=0)
    param_persistence_threshold: int = Field(default=100_000, ge=0)
    max_reuse_distance: int = Field(default=1_000_000_000, ge=0)
    offload: Literal["none", "optimizer", "all"] = "none"


class TrainOptions(Options):
    """How the run is optimised, saved and watched.

    global_batch_size: samples per optimizer step over all ranks; the world size must divide it. The packs
        (micro-batches) of a step follow from the budgets in `data:`, so gradient accumulation has no key of its own.
    learning_rates: rate per part (guidance, qformer, projection, vision, language_model) where it differs.
    resume_from_checkpoint: `auto` (the newest complete checkpoint in output_dir, or a fresh start), a
        checkpoint folder, or null: a fresh start, which refuses an output_dir that holds another run.
    """

    max_steps: int | None = Field(default=None, ge=1)
    num_train_epochs: float = Field(default=1.0, gt=0)  # used where max_steps is null
    global_batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=2e-5, gt=0)
    learning_rates: dict[Literal["guidance", "qformer", "projection", "vision", "language_model"], float] = Field(
        default_factory=dict
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int | None = Field(default=None, ge=0)
    warmup_ratio: float = Field(default=0.05, ge=0, le=1)  # used where warmup_steps is null
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    weight_decay: float = Field(default=0.05, ge=0)  # not on 1-D parameters
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    zero: ZeroOptions = ZeroOptions()
    logging_steps: int = Field(default=1, ge=1)
    eval_steps: int | None = Field(default=None, ge=1)  # validation loss; null: only at the end
    save_steps: int | None = Field(default=None, ge=1)  # null: only at the end
    save_total_limit: int = Field(default=2, ge=1)  # the best one is kept besides
    resume_from_checkpoint: str | None = "auto"
    timeout_seconds: float = Field(default=600.0, gt=0)  # a step that takes longer is a hang
    max_loss_spike: float | None = Field(default=None, gt=1)  # stop when loss > this x its running mean

    @model_validator(mode="after")
    def _warmup_fits(self) -> "TrainOptions":
        if self.max_steps is not None and self.warmup_steps is not None and self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) exceeds max_steps ({self.max_steps})")
        return self
