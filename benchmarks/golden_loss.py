"""Golden loss: the first steps of the mini recipe's training, here and on another device, must agree.

    python -m benchmarks.golden_loss --device cpu --steps 50 --write      make the trajectory that is committed
    python -m benchmarks.golden_loss --device cuda --record               compare; the exit code says whether it agrees

The recipe's own sizes, guidance, what trains, optimizer, schedule and step size; weights and samples are drawn on the
CPU from the seed, so that nothing has to be carried: no packages with weights, no shards, no Ray, no DeepSpeed. Answers
use few words, so there is something to learn. The trainer's own step runs on the benchmark's plain engine.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from transformers import InstructBlipQFormerConfig, LlamaConfig

from benchmarks.train.models import construct, fill
from benchmarks.train.plain_engine import PlainEngine
from benchmarks.train.samples import draw_step
from benchmarks.train.shapes import ModelShape
from samtrain.core.files import atomic_write_json
from samtrain.core.precision import exact_float32
from samtrain.core.versions import git_commit, versions
from samtrain.engine.optimizer import learning_rate_factor
from samtrain.engine.step import run_step
from samtrain.model import register
from samtrain.model.configuration import SamMllmConfig
from samtrain.model.efficientnet_lite import EfficientNetLiteConfig
from samtrain.model.freezing import apply_freezing
from samtrain.model.kernels import choose_kernels
from samtrain.model.lora import attach_lora
from samtrain.model.modeling import SamMllmForConditionalGeneration
from samtrain.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "mini.yaml"
FILE = ROOT / "benchmarks" / "results" / "golden-loss.json"
STEPS = 50
WORDS = 64  # that answers and questions are made of
Precision = Literal["fp32", "bf16"]

# Relative difference of a step's loss. float32 differs by the order of sums alone, which training amplifies; bfloat16
# by three digits of every operation.
TOLERANCE: dict[Precision, float] = {"fp32": 2e-3, "bf16": 3e-2}


@dataclass(frozen=True)
class GoldenStep:
    """loss: mean over the step's label tokens. grad_norm: before clipping."""

    loss: float
    grad_norm: float


def golden_shape(recipe: Recipe) -> ModelShape:
    """Widths of what the recipe loads from packages: MiniLM as the Q-Former's start, SmolLM2-135M."""
    return ModelShape(
        name=recipe.name,
        vision={"image_size": recipe.data.image_size},
        qformer={
            "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
            "intermediate_size": 1536, "max_position_embeddings": 512, **recipe.model.qformer.config,
        },
        text={
            "vocab_size": 49153, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        },
        num_query_tokens=recipe.model.qformer.num_query_tokens,
        initial_layer=recipe.model.guidance.initial_layer,
        contextual_layer=recipe.model.guidance.contextual_layer,
        context=recipe.model.guidance.context,
        max_tokens=recipe.data.max_tokens,
        max_images=recipe.data.max_images,
        samples=recipe.train.global_batch_size,
    )  # fmt: skip


def build_golden(recipe: Recipe, shape: ModelShape, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The recipe's model with weights drawn on the CPU, then moved."""
    register()
    vision = EfficientNetLiteConfig(image_size=shape.image_size)
    guidance = recipe.model.guidance
    config = SamMllmConfig(
        vision_config=vision,
        qformer_config=InstructBlipQFormerConfig(**shape.qformer, encoder_hidden_size=vision.hidden_size),
        text_config=LlamaConfig(**shape.text),
        num_query_tokens=shape.num_query_tokens,
        guidance_mode=guidance.mode,
        guidance_context=guidance.context,
        initial_layer=guidance.initial_layer,
        contextual_layer=guidance.contextual_layer,
        order_embedding=guidance.order_embedding,
        max_images=guidance.max_images,
        image_token_id=shape.image_token_id,
    )
    config._attn_implementation = recipe.model.attn_implementation
    cpu = torch.device("cpu")
    model = construct(lambda: SamMllmForConditionalGeneration(config), dtype, cpu)
    model.tie_weights()
    if recipe.model.train.language_model == "lora":
        attach_lora(model, recipe.model.train.lora)
    fill(model)
    apply_freezing(model, recipe.model.train)
    trains_qformer = recipe.model.train.qformer
    model.kernels = choose_kernels(
        "auto", config.qformer_config, device_type=device.type, qformer_trains=trains_qformer
    )
    moved: Any = model
    return moved.to(device).train()


def trajectory(
    recipe: Recipe, *, steps: int, precision: Precision, device: torch.device, shape: ModelShape | None = None
) -> Iterator[GoldenStep]:
    """Train and tell, step by step."""
    shape = shape or golden_shape(recipe)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    options = recipe.train.model_copy(update={"precision": precision})
    engine: Any = PlainEngine(build_golden(recipe, shape, dtype=dtype, device=device), options=options, device=device)
    nobody: Any = _Nobody()
    for i in range(steps):
        data = draw_step(
            shape, text="mini", samples=shape.samples, max_images=shape.max_images, seed=recipe.seed + i, words=WORDS
        )
        engine.set_learning_rate(learning_rate_factor(i, options, recipe.train.max_steps or steps))
        result = run_step(
            engine,
            data.global_step(),
            step_number=i + 1,
            stop_requested=False,
            watchdog=nobody,
        )
        yield GoldenStep(float(result.loss_sum) / result.counts.label_tokens, engine.grad_norm)


class _Nobody:
    """In the watchdog's place."""

    def enter(self, phase: str, **_: Any) -> None:
        pass


def first_difference(
    found: list[GoldenStep], expected: list[GoldenStep], *, precision: Precision
) -> tuple[int, float] | None:
    """(step, relative difference of the loss) where they part by more than the tolerance; None: they agree."""
    for i, (a, b) in enumerate(zip(found, expected), start=1):
        difference = abs(a.loss - b.loss) / abs(b.loss)
        if not difference <= TOLERANCE[precision]:  # NaN too
            return i, difference
    return None


def identity(recipe: Recipe, shape: ModelShape) -> dict[str, Any]:
    """What a trajectory belongs to: compared before any step."""
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "shape": json.loads(json.dumps(vars(shape))),
        "train": recipe.train.model_dump(mode="json"),
        "parts": recipe.model.train.model_dump(mode="json"),
    }


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    device: Annotated[str, typer.Option(help="cpu, cuda")] = "cpu",
    steps: Annotated[int | None, typer.Option(help="default: those of the file", min=1)] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16")] = "fp32",
    write: Annotated[bool, typer.Option(help="keep this trajectory as the golden one (CPU only)")] = False,
    record: Annotated[bool, typer.Option(help="keep what the comparison found in the file")] = False,
    file: Annotated[Path, typer.Option()] = FILE,
) -> None:
    if precision not in TOLERANCE:
        raise typer.BadParameter(f"--precision {precision}: choose from {', '.join(TOLERANCE)}")
    if write and device != "cpu":
        raise typer.BadParameter("--write: the golden trajectory is the CPU's")
    exact_float32()
    recipe = load_recipe(RECIPE)
    shape = golden_shape(recipe)
    golden = json.loads(file.read_text()) if file.exists() else {"trajectories": {}}
    if not write:
        _check(golden, identity(recipe, shape), precision, file)
    if steps is None:
        steps = STEPS if write else len(golden["trajectories"][precision]["steps"])
    found = []
    for i, one in enumerate(trajectory(recipe, steps=steps, precision=precision, device=torch.device(device)), start=1):
        print(f"step {i}: loss {one.loss:.6f}, gradient norm {one.grad_norm:.4f}", flush=True)
        found.append(one)
    where = machine_of(device)
    if write:
        golden["identity"] = identity(recipe, shape)
        golden["trajectories"][precision] = where | {"steps": [vars(one) for one in found], "compared": []}
        atomic_write_json(file, golden)
        return
    expected = [GoldenStep(**values) for values in golden["trajectories"][precision]["steps"]]
    compared = min(len(found), len(expected))
    worst = max(abs(a.loss - b.loss) / abs(b.loss) for a, b in zip(found, expected))
    difference = first_difference(found, expected, precision=precision)
    print(f"{compared} steps compared, {precision}: largest relative difference of the loss {worst:.2e}")
    if record:
        result = {"steps": compared, "largest_difference": worst, "tolerance": TOLERANCE[precision]}
        golden["trajectories"][precision]["compared"].append(where | result | {"agrees": difference is None})
        atomic_write_json(file, golden)
    if difference is not None:
        print(f"they part at step {difference[0]}; tolerance {TOLERANCE[precision]:g}")
        raise typer.Exit(1)


def machine_of(device: str) -> dict[str, Any]:
    """What computed, and with what."""
    found = {"device": device, "threads": torch.get_num_threads(), "commit": git_commit()}
    if device != "cpu":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found | {"versions": {k: v for k, v in versions().items() if k in ("torch", "transformers")}}


def _check(golden: dict[str, Any], ours: dict[str, Any], precision: str, file: Path) -> None:
    """Raises typer.BadParameter where there is nothing to compare with."""
    if precision not in golden["trajectories"]:
        raise typer.BadParameter(f"{file}: has no {precision} trajectory; make one with --device cpu --write")
    differ = [key for key, value in ours.items() if golden["identity"].get(key) != value]
    if differ:
        raise typer.BadParameter(f"{file}: was made with another {', '.join(differ)}; make a new one with --write")


def small(shape: ModelShape) -> ModelShape:
    """For tests: the same recipe at a few widths."""
    return replace(
        shape,
        qformer=shape.qformer | {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 64},
        text=shape.text
        | {"vocab_size": 130, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
        | {"num_attention_heads": 3, "num_key_value_heads": 3},
        samples=4,
    )


if __name__ == "__main__":
    app()
