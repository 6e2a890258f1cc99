"""From the start of a process to the end of its first training step, weights read from files.

The parent writes the weights once, so the child's reads find a warm file cache, and measures from just before it starts
the child. The child goes the way of `samtrain.model.build`: construct, draw what has no source, stream the rest in.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHARD_BYTES = 4 * 2**30


def write_weights(model: Any, folder: Path) -> int:
    """The frozen parts as sharded safetensors, as a public checkpoint comes; returns bytes."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    shard: dict[str, Any] = {}
    size = total = number = 0

    def flush() -> None:
        nonlocal shard, size, number
        if shard:
            name = f"model-{number:05d}.safetensors"
            save_file(shard, folder / name)
            weight_map.update(dict.fromkeys(shard, name))
            shard, size, number = {}, 0, number + 1

    for name, parameter in model.named_parameters():
        if name.startswith("guidance.") or ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        value = parameter.detach().cpu().contiguous()
        num_bytes = value.numel() * value.element_size()
        if size + num_bytes > SHARD_BYTES:
            flush()
        shard[plain] = value
        size, total = size + num_bytes, total + num_bytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def in_a_process(arguments: dict[str, Any]) -> dict[str, float]:
    """Run the child; returns seconds since its start: stage -> when it was over.

    Raises:
        subprocess.CalledProcessError: its stderr says why.
    """
    command = [sys.executable, "-m", "benchmarks.train.first_step", json.dumps(arguments)]
    started = time.time()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    stages: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {stage: when - started for stage, when in stages.items()}


def run(
    *, shape: str, train: str, weights: str, text: str, samples: int, max_images: int, checkpointing: bool,
    device: str, dtype: str,
) -> tuple[dict[str, float], float]:  # fmt: skip
    """Stage -> clock time at its end, and the mean loss of the first step."""
    stages: dict[str, float] = {}
    import torch

    from benchmarks.train.loops import OurLoop, Setting
    from benchmarks.train.models import choices_for, construct_ours
    from benchmarks.train.samples import draw_step
    from benchmarks.train.shapes import SHAPES, trains
    from samtrain.core.parameters import no_gather
    from samtrain.model.build import initialise
    from samtrain.model.freezing import apply_freezing
    from samtrain.model.lora import attach_lora
    from samtrain.model.options import ModelOptions
    from samtrain.model.pretrained import load_weights, plan_weights

    stages["imports"] = time.time()
    setting = Setting(SHAPES[shape], train, getattr(torch, dtype), torch.device(device), checkpointing)  # type: ignore[arg-type]
    options = trains(setting.train, guided=True)
    choices = choices_for(setting.shape, train=setting.train, guided=True, runs_on=device)
    model = construct_ours(
        setting.shape, guided=True, dtype=setting.dtype, device=setting.device, attention=choices.attention
    )
    plan = plan_weights(model, ModelOptions(model_name_or_path=weights))
    initialise(model, seed=0, loaded=set(plan.readers), gather=no_gather)
    stages["construction"] = time.time()
    load_weights(model, plan, gather=no_gather)
    if options.language_model == "lora":
        with setting.device:
            attach_lora(model, options.lora)
    apply_freezing(model, options)
    choices.apply(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    _wait(device)
    stages["weights"] = time.time()
    data = draw_step(setting.shape, text=text, samples=samples, max_images=max_images)  # type: ignore[arg-type]
    loop = OurLoop(setting, data, model.train())
    loop.activate()
    loop.batches  # noqa: B018 - in a run the loader has them ready
    stages["engine and data"] = time.time()
    loss = float(loop.step()) / loop.num_labels
    _wait(device)
    stages["first step"] = time.time()
    return stages, loss


def _wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


if __name__ == "__main__":
    print(json.dumps(run(**json.loads(sys.argv[1]))[0]))
