"""How many GPUs a recipe needs: bytes on each, computed from shapes and counted on the largest pack of the real data.

Nothing is measured, and no GPU has confirmed it. Weights, gathered parameters, gradients and optimizer are arithmetic
(`engine/zero_memory.py`), activations are counted (`model/activations.py`). Not in it: what the allocator loses to
fragments, the CUDA context, NCCL's buffers and the libraries' workspaces; `with_allowance` stands for these.
"""

from dataclasses import dataclass

from torch import nn

from samtrain.core.events import Emit
from samtrain.engine.zero_memory import Memory, Parameter, checkpoint_copy_bytes, memory_of_run
from samtrain.recipe import Recipe

WORLD_SIZES = (1, 2, 4, 8, 16, 32, 64)
GPU_SIZES = (24, 40, 48, 80, 141)  # GB of 10^9 bytes; a card's own count is a little higher
FIXED_ALLOWANCE = 2.0e9
SHARE_ALLOWANCE = 0.10
COLUMNS = ["workers", "weights", "gathered", "gradients", "optimizer", "activations", "total", "fits on", "host"]


@dataclass(frozen=True)
class MemoryPlan:
    """own: the recipe's number of workers. by_workers: number -> bytes of a GPU. host: number -> of its worker's host
    memory, with the checkpoint copy. counted: what the activations are of, in words."""

    own: int
    by_workers: dict[int, Memory]
    host: dict[int, float]
    counted: str

    def smallest(self, gpu_size: int) -> int | None:
        """The smallest number of workers on GPUs of so many GB; None: none of these numbers."""
        return next((n for n, held in sorted(self.by_workers.items()) if fits(held, gpu_size)), None)

    def answer(self) -> str:
        """One sentence: the smallest number of workers for each size of GPU."""
        parts = []
        for size in GPU_SIZES:
            found = self.smallest(size)
            parts.append(f"{size} GB: " + (f"no number up to {max(self.by_workers)}" if found is None else str(found)))
        return f"GPUs needed, at least, of each size: {'; '.join(parts)}."

    def rows(self) -> list[list[str]]:
        """Of a table with COLUMNS; GB. The recipe's own number comes first."""
        order = [self.own, *(n for n in sorted(self.by_workers) if n != self.own)]
        return [self._row(n) for n in order]

    def _row(self, num_workers: int) -> list[str]:
        held = self.by_workers[num_workers]
        sizes = [str(size) for size in GPU_SIZES if fits(held, size)]
        figures = (held.weights, held.gathered, held.gradients, held.optimizer, held.activations, held.total)
        name = f"{num_workers} (recipe)" if num_workers == self.own else str(num_workers)
        return [
            name,
            *(gigabytes(figure) for figure in figures),
            f"{', '.join(sizes)} GB" if sizes else "none",
            gigabytes(self.host[num_workers]),
        ]


def plan_memory(recipe: Recipe, *, emit: Emit) -> MemoryPlan:
    """Predict what the recipe holds, and emit it as a table and an answer. The data set must be there.

    Raises:
        InputError: of recipe or data, as the preflight.
    """
    from samtrain.data.mixture import open_training_set
    from samtrain.data.preflight import largest_pack
    from samtrain.engine.zero import DTYPES
    from samtrain.model.activations import count_activations
    from samtrain.model.build import build_empty
    from samtrain.model.parts import build_processor

    processor = build_processor(recipe.model, image_size=recipe.data.image_size)
    batch = largest_pack(open_training_set(recipe.data), processor, recipe.data)
    activations = count_activations(
        recipe.model,
        batch,
        dtype=DTYPES[recipe.train.precision],
        gradient_checkpointing=recipe.train.gradient_checkpointing,
    )
    parameters = parameters_in(build_empty(recipe.model))
    own = recipe.launch.num_workers
    by_workers = {
        n: memory_of_run(parameters, recipe.train, world_size=n, activations=activations.num_bytes)
        for n in sorted({own, *WORLD_SIZES})
    }
    host = {n: held.host + checkpoint_copy_bytes(parameters, world_size=n) for n, held in by_workers.items()}
    checkpointing = "with" if recipe.train.gradient_checkpointing else "without"
    counted = (
        f"{batch.num_tokens} tokens, {batch.num_images} images, {len(batch.keys)} samples; {activations.counted}, "
        f"{checkpointing} gradient checkpointing"
    )
    plan = MemoryPlan(own, by_workers, host, counted)
    emit({"kind": "eval", "title": "predicted memory of each GPU, GB", "columns": COLUMNS, "rows": plan.rows()})
    emit({"kind": "plan", "title": "how many GPUs", "rows": _notes(recipe, plan)})
    return plan


def parameters_in(model: nn.Module) -> list[Parameter]:
    """Of a model whose `requires_grad` is set, in its order. Nothing trains below a frozen vision tower: it has no
    backward pass."""
    from samtrain.model.freezing import part_of

    named = [(part_of(name), name, p) for name, p in model.named_parameters()]
    vision_trains = any(part == "vision" and p.requires_grad for part, _, p in named)
    return [
        # A frozen embedding has no input to send a gradient to.
        Parameter(
            p.numel(),
            part,
            is_trainable=p.requires_grad,
            has_backward=(part != "vision" or vision_trains) and (p.requires_grad or "embed" not in name),
        )
        for part, name, p in named
    ]


def with_allowance(held: Memory) -> float:
    """Bytes that a GPU should have for this: what is not in the prediction is allowed for."""
    return held.total * (1 + SHARE_ALLOWANCE) + FIXED_ALLOWANCE


def fits(held: Memory, gpu_size: int) -> bool:
    """Whether a GPU of so many GB holds it with the allowance."""
    return with_allowance(held) <= gpu_size * 1e9


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}"


def _notes(recipe: Recipe, plan: MemoryPlan) -> list[list[str]]:
    zero = recipe.train.zero
    uneven = [n for n in plan.by_workers if recipe.train.global_batch_size % n]
    notes = [
        ["answer", plan.answer()],
        ["how sure", "computed, not measured: no GPU has confirmed it"],
        [
            "not in the total",
            "fragments of the allocator, CUDA context, NCCL, workspaces of libraries; a GPU is said to hold it where "
            f"{SHARE_ALLOWANCE:.0%} and {FIXED_ALLOWANCE / 1e9:g} GB more would fit (GB are 10^9 bytes)",
        ],
        ["activations", f"of the largest pack: {plan.counted}; no number of workers changes them"],
        [
            "zero",
            f"frozen towers {zero.frozen_towers}, offload {zero.offload}; host is of each worker, all kinds of it",
        ],
    ]
    if uneven:
        numbers = ", ".join(map(str, uneven))
        size = recipe.train.global_batch_size
        notes.append(["batch", f"train.global_batch_size {size} would have to change for {numbers} workers"])
    return notes
