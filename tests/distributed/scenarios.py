"""What a rank does in a distributed test; run by `conftest.launch` with CONFIG in its globals.

Legend: T tokens, I images, D width. The tiny model honours the batch contract: one tower call per micro-batch,
with a zero-weighted dummy where there is no image.
"""

import itertools
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samtrain.core.batch import IGNORE_INDEX, GlobalStep, ImageGroups, PackedBatch
from samtrain.core.errors import SamtrainError
from samtrain.core.seeds import derive_seed, seed_everything
from samtrain.engine import checkpoint as checkpoint_module
from samtrain.engine.callbacks import Callback
from samtrain.engine.checkpoint import Checkpointer
from samtrain.engine.checkpoint_folder import complete_checkpoints, find_resume
from samtrain.engine.evaluate import evaluate_loss
from samtrain.engine.optimizer import build_parameter_groups, learning_rate_factor
from samtrain.engine.options import TrainOptions
from samtrain.engine.state import TrainState
from samtrain.engine.trainer import Trainer
from samtrain.engine.watchdog import Watchdog

CONFIG: dict = globals()["CONFIG"]
IMAGE_TOKEN, VOCABULARY, WIDTH, IMAGES_PER_SAMPLE = 31, 32, 8, (3, 1, 0, 2, 0, 1)


class Output(dict):
    loss_sum = property(lambda self: self["loss_sum"])


class TinyModel(nn.Module):
    def __init__(self, tower_width: int = WIDTH, *, is_checkpointed: bool = False) -> None:
        super().__init__()
        self.is_checkpointed = is_checkpointed
        self.query = nn.Parameter(torch.full((1, WIDTH), 0.1))
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.tower = nn.Sequential(nn.Linear(12, tower_width), nn.Tanh(), nn.Linear(tower_width, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor, pixel_values: Tensor, **ignored: object) -> Output:
        is_image = input_ids == IMAGE_TOKEN
        dummy = not len(pixel_values)
        pixels = pixel_values.new_zeros(1, 3, 2, 2) if dummy else pixel_values
        pixels = pixels.flatten(1).to(self.query.dtype)
        features = checkpoint(self.tower, pixels, use_reentrant=False) if self.is_checkpointed else self.tower(pixels)
        features = features + self.query  # [I, D]
        hidden = self.embedding(input_ids)  # [T, D]
        if dummy:
            hidden = hidden + 0.0 * features.sum()
        else:
            hidden = hidden.masked_scatter(is_image[:, None], features)
        logits = self.head(self.norm(hidden)).float()
        counted = labels != IGNORE_INDEX
        loss = nn.functional.cross_entropy(logits, labels.clamp(min=0), reduction="none")
        return Output(loss_sum=torch.where(counted, loss, 0.0).sum())


def pack(step: int, slots: list[int], *, size: int = 2) -> PackedBatch:
    """Samples `slots` of a step, one query token per image; no slots: the filler."""
    ids, labels, positions, pixels, borders, images = [], [], [], [], [0], [0]
    for slot in slots or [-1]:
        random = torch.Generator().manual_seed(derive_seed("sample", step, slot) % 2**32)
        count = IMAGES_PER_SAMPLE[slot] if slot >= 0 else 0
        length = 2 + count + slot if slot >= 0 else 1
        text = torch.randint(0, IMAGE_TOKEN, (length,), generator=random)
        text[1 : 1 + count] = IMAGE_TOKEN
        label = (text * 7 + torch.arange(length)) % IMAGE_TOKEN  # image tokens too: the tower must matter
        label[0] = IGNORE_INDEX
        ids.append(text), labels.append(label), positions.append(torch.arange(length))
        pixels.append(torch.randn(count, 3, size, size, generator=random))
        borders.append(borders[-1] + length), images.append(images[-1] + count)
    num_samples = max(1, len(slots))
    labels = torch.cat(labels)
    return PackedBatch(
        input_ids=torch.cat(ids),
        labels=labels,
        position_ids=torch.cat(positions),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        pixel_values=torch.cat(pixels),
        qformer_input_ids=torch.ones(num_samples, 1, dtype=torch.int64),
        qformer_attention_mask=torch.ones(num_samples, 1, dtype=torch.int64),
        image_groups=ImageGroups.from_counts([b - a for a, b in itertools.pairwise(images)]),
        image_token_id=IMAGE_TOKEN,
        num_query_tokens=1,
        keys=tuple(f"s{step}.{slot}" for slot in slots),
        num_label_tokens=int((labels != IGNORE_INDEX).sum()),
    ).validate()


def global_step(step: int, *, rank: int, world_size: int, size: int = 2) -> GlobalStep:
    """Three packs of two, three and one samples: images 4, 2 and 1; every third step 0, 2 and 4 (a rank without)."""
    packs = [[0, 1], [2, 3, 4], [5]] if step % 3 else [[2, 4], [3], [0, 1]]
    mine = packs[rank::world_size]
    mine += [[]] * (-(-len(packs) // world_size) - len(mine))
    skipped = {f"bad{step}.{rank}": "cannot be decoded"} if step == 2 and rank == world_size - 1 else {}
    keys = tuple(f"s{step}.{slot}" for slots in packs for slot in slots)
    return GlobalStep(tuple(pack(step, slots, size=size) for slots in mine), {"next": step + 1}, keys, skipped)


def steps_from(first: int, *, rank: int, world_size: int, nan_at: int | None = None, hang: tuple = ()):
    step = first
    while True:
        if tuple(hang) == (rank, step):
            time.sleep(3600)
        share = global_step(step, rank=rank, world_size=world_size)
        if step == nan_at and rank == world_size - 1:
            share.micro_batches[0].pixel_values.fill_(float("nan"))
        yield share
        step += 1


def hanging_after(steps: list[GlobalStep]):
    yield from steps
    time.sleep(3600)


def options(**changes) -> TrainOptions:
    zero = {"reduce_bucket_size": 1000, "prefetch_bucket_size": 100, "param_persistence_threshold": 20}
    values = {
        "learning_rate": 0.05, "learning_rates": {"projection": 0.02}, "warmup_steps": 2, "weight_decay": 0.1,
        "max_grad_norm": 0.05, "precision": "fp32", "logging_steps": 1,
    }  # fmt: skip
    return TrainOptions(**(values | changes | {"zero": zero | changes.get("zero", {})}))


def part_of(name: str) -> str:
    return {"tower": "vision", "head": "projection"}.get(name.split(".")[0], "language_model")


class HeldWrites:
    """Keeps this rank from writing its file of checkpoint `step` to the end, until training has made step `until`."""

    def __init__(self, *, rank: int, step: int, until: int) -> None:
        self.name, self.until = f".checkpoint-{step}.partial", until
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()
        if rank == CONFIG["rank"]:
            self.write, checkpoint_module.write_tensors = checkpoint_module.write_tensors, self

    def __call__(self, folder, tensors, *, rank):
        if folder.name == self.name:
            (folder / f"fragments-{rank:05d}.safetensors").write_bytes(b"half of it")
            self.has_begun.set()
            self.may_go_on.wait()
        self.write(folder, tensors, rank=rank)


class Recorder(Callback):
    """Writes what happens to a file at once; sends signals to its own process."""

    def __init__(
        self,
        path: Path,
        *,
        signals: dict[int, tuple[int, int]],
        limit_file_size_after: int | None,
        held: HeldWrites | None,
        signals_wait_for: list[str] | None,
    ) -> None:
        self.path, self.signals, self.limit_file_size_after = path, signals, limit_file_size_after
        self.held, self.signals_wait_for = held, signals_wait_for

    def write(self, **values: object) -> None:
        with open(self.path, "a") as stream:
            stream.write(json.dumps(values) + "\n")

    def on_train_start(self, state, plan) -> None:
        self.write(event="start", first_step=plan["first_step"])

    def on_step_end(self, state, step, metrics, skipped) -> None:
        self.write(event="step", step=state.global_step, keys=step.keys, metrics=metrics, skipped=skipped)
        if self.held is not None and state.global_step == self.held.until:
            self.held.may_go_on.set()
        rank, number = self.signals.get(state.global_step, (None, None))
        if rank is not None and self.signals_wait_for is not None:
            while not self.may_signal():
                time.sleep(0.01)
            time.sleep(0.5)  # what must not happen now had the time to
        if rank == CONFIG["rank"] or rank == -1:
            os.kill(os.getpid(), number)
        if state.global_step == self.limit_file_size_after:
            # Less than a checkpoint's fragments (6.8 kB), more than this record of the few steps that follow (3 kB).
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))

    def may_signal(self) -> bool:
        """The file that signals wait for is there, with what it begins with."""
        name, begins_with = self.signals_wait_for or ("", "")
        path = self.path.parent / name
        return path.is_file() and path.read_text().startswith(begins_with)

    def on_save(self, saved) -> None:
        self.write(event="save", step=saved.state.global_step, best_step=saved.state.best_step)

    def on_evaluate(self, state, metrics) -> None:
        self.write(event="evaluate", metrics=metrics)

    def on_train_end(self, state, status) -> None:
        self.write(event="end", status=status)


def build_engine(
    chosen: TrainOptions,
    *,
    frozen: list[str],
    tower_width: int = WIDTH,
    construct: bool = True,
    seed=7,
    is_checkpointed=False,
):
    from contextlib import nullcontext

    from samtrain.engine import zero

    device = torch.device("cpu")
    zero.init_distributed(device, timeout_seconds=chosen.timeout_seconds)
    seed_everything(seed)
    with zero.partitioned_construction(chosen)() if construct else nullcontext():
        model = TinyModel(tower_width, is_checkpointed=is_checkpointed).to(zero.DTYPES[chosen.precision])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(frozen)) if frozen else True)
    groups = build_parameter_groups(model.named_parameters(), chosen, part_of)
    return zero.initialize(model, options=chosen, parameter_groups=groups, device=device)


def train(
    *, output_dir, total_steps=4, frozen=(), tower_width=WIDTH, construct=True, seed=7, is_checkpointed=False,
    resume=None, warm_up=False, evaluate_every=None, signals=None, limit_file_size_after=None, nan_at=None, hang=(),
    count_gathers=False, hang_in_evaluation=False, held_writes=None, signals_wait_for=None, **changes
):  # fmt: skip
    """The whole loop; returns the losses and the weights of rank 0."""
    from samtrain.engine import zero

    rank, world_size = CONFIG["rank"], CONFIG["world_size"]
    chosen = options(eval_steps=evaluate_every, **changes)
    engine = build_engine(
        chosen,
        frozen=list(frozen),
        tower_width=tower_width,
        construct=construct,
        seed=seed,
        is_checkpointed=is_checkpointed,
    )
    output_dir = Path(output_dir)
    checkpointer = Checkpointer(engine, output_dir, recipe_yaml="name: tiny\n", save_total_limit=2, part_of=part_of)
    found = find_resume(output_dir, resume)
    state = checkpointer.load(found) if found else TrainState(tracker_run_id="run-1")
    first = state.cursor.get("next", 1)
    recorder = Recorder(
        output_dir / f"record-{rank}.jsonl",
        signals={int(step): tuple(what) for step, what in (signals or {}).items()},
        limit_file_size_after=limit_file_size_after,
        held=HeldWrites(**held_writes) if held_writes else None,
        signals_wait_for=signals_wait_for,
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    validation = [global_step(1000, rank=rank, world_size=world_size)]

    def evaluate(watchdog: Watchdog) -> dict[str, float]:
        steps = hanging_after(validation) if hang_in_evaluation else validation
        return evaluate_loss(engine, steps, watchdog=watchdog, step_number=state.global_step)

    trainer = Trainer(
        engine,
        steps_from(first, rank=rank, world_size=world_size, nan_at=nan_at, hang=hang),
        options=chosen,
        total_steps=total_steps,
        state=state,
        callbacks=[recorder],
        evaluate=evaluate if evaluate_every else None,
        checkpointer=checkpointer,
        warmup_batch=pack(99, [0, 1, 3] if rank == 0 else []) if warm_up else None,
    )
    gathers = count_gathered_elements() if count_gathers else {"elements": 0}
    before = signal.getsignal(signal.SIGTERM)
    try:
        trainer.fit()
    finally:
        assert signal.getsignal(signal.SIGTERM) is before
    assert engine.module.training
    gathered = gathers["elements"]
    if count_gathers:  # a forward releases what it does not keep
        evaluate_loss(engine, validation)
    is_resident = [p.ds_status.name == "AVAILABLE" for p in engine.module.parameters() if not p.requires_grad]
    result = {"is_resident": is_resident, "gathered": gathered, "state": state.to_dict()}
    result["weights"] = {n: w.tolist() for n, w in zero.consolidated(engine.module) if w is not None}
    result["first"] = first
    return result


def count_gathered_elements() -> dict[str, int]:
    """Count the elements that all-gathers over more than one rank bring in, from now on."""
    from deepspeed import comm

    counted = {"elements": 0}
    backend = comm.comm.cdb
    original = backend.all_gather_into_tensor

    def counting(output_tensor, input_tensor, group=None, **others):
        if torch.distributed.get_world_size(group) > 1:
            counted["elements"] += output_tensor.numel()
        return original(output_tensor=output_tensor, input_tensor=input_tensor, group=group, **others)

    backend.all_gather_into_tensor = counting
    return counted


def oracle(*, total_steps=4, frozen=(), **changes):
    """Plain torch: one process, no DeepSpeed, all samples of a step in one sum, torch.optim.AdamW."""
    chosen = options(**changes)
    seed_everything(7)
    model = TinyModel()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(frozen)) if frozen else True)
    optimizer = torch.optim.AdamW(
        build_parameter_groups(model.named_parameters(), chosen, part_of), betas=(0.9, 0.999), eps=1e-8
    )
    losses, norms = [], []
    for step in range(1, total_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * learning_rate_factor(step - 1, chosen, total_steps)
        batches = global_step(step, rank=0, world_size=1).micro_batches
        tokens = sum(batch.num_label_tokens for batch in batches)
        loss = sum(model(**batch.model_inputs()).loss_sum for batch in batches) / tokens
        optimizer.zero_grad()
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        norms.append(float(nn.utils.clip_grad_norm_(trained, chosen.max_grad_norm)))
        optimizer.step()
        losses.append(float(loss))
    return {"losses": losses, "norms": norms, "weights": {n: p.tolist() for n, p in model.named_parameters()}}


def multimodal(*, output_dir, trained, zero_options, kernels, compiles_vision, context, total_steps=2):
    """The real model, tiny, checkpointed: its losses by the engine, with `kernels`, and by plain torch, without."""
    from torch._dynamo.testing import CompileCounter
    from transformers import InstructBlipQFormerConfig, InstructBlipVisionConfig, LlamaConfig

    from samtrain.engine import zero
    from samtrain.engine.step import run_step
    from samtrain.model import SamMllmConfig, SamMllmForConditionalGeneration
    from samtrain.model.compilation import compile_layers
    from samtrain.model.freezing import apply_freezing, part_of
    from samtrain.model.options import TrainablePartsOptions

    vision = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    qformer = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    language = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    rank, world_size = CONFIG["rank"], CONFIG["world_size"]
    zero.init_distributed(torch.device("cpu"))
    chosen = options(learning_rate=0.01, learning_rates={}, zero=zero_options)

    def build(kernels: str) -> nn.Module:
        seed_everything(3)
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = SamMllmConfig(
            vision_config=InstructBlipVisionConfig(**vision, image_size=8, patch_size=4, initializer_range=0.2),
            qformer_config=InstructBlipQFormerConfig(
                **qformer, **dropout, vocab_size=40, encoder_hidden_size=12, initializer_range=0.2
            ),
            text_config=LlamaConfig(**language, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0),
            num_query_tokens=1, image_token_id=IMAGE_TOKEN, initial_layer=2, contextual_layer=3, max_images=5,
            order_embedding=True, guidance_context=context,
        )  # fmt: skip
        model = SamMllmForConditionalGeneration(config)
        model.kernels = kernels
        apply_freezing(model, TrainablePartsOptions(**trained))
        model.gradient_checkpointing_enable()
        return model.train()

    plain, losses = build("materialised"), []
    groups = build_parameter_groups(plain.named_parameters(), chosen, part_of)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    for step in range(1, total_steps + 1):
        batches = global_step(step, rank=0, world_size=1, size=8).micro_batches
        # Every batch on its own: the losses of a step do not depend on how it is packed.
        loss = sum(plain(**b.model_inputs()).loss_sum for b in batches) / sum(b.num_label_tokens for b in batches)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in plain.parameters() if p.requires_grad], chosen.max_grad_norm)
        optimizer.step()
        losses.append(float(loss))

    model, layer_calls = build(kernels), []
    compilations = CompileCounter()
    if compiles_vision:
        compile_layers(model.vision_model, backend=compilations)
    # Layer 1 (1-based) reads images and comes before k: the kernels' path goes around its forward.
    model.qformer.encoder.layer[0].register_forward_pre_hook(lambda *_: layer_calls.append(1))
    groups = build_parameter_groups(model.named_parameters(), chosen, part_of)
    engine = zero.initialize(model, options=chosen, parameter_groups=groups, device=torch.device("cpu"))
    watchdog, found = Watchdog(output_dir=output_dir, rank=rank, timeout_seconds=60), []
    gathers = count_gathered_elements()
    for step in range(1, total_steps + 1):
        share = global_step(step, rank=rank, world_size=world_size, size=8)
        result = run_step(engine, share, step_number=step, watchdog=watchdog)
        torch.distributed.all_reduce(result.loss_sum)
        found.append(float(result.loss_sum) / result.counts.label_tokens)
    difference = 0.0
    for (_, weight), expected in zip(zero.consolidated(engine.module), plain.parameters()):
        if weight is not None:
            difference = max(difference, float((weight - expected).abs().max()))
    counts = {"gathered": gathers["elements"], "layer_calls": len(layer_calls)}
    counts["compilations"] = compilations.frame_count
    return {"plain": losses, "engine": found, "weight_difference": difference, **counts}


def refusals(*, output_dir):
    """What loading must refuse, one message each; a single rank."""
    path = find_resume(output_dir, "auto")
    engine = build_engine(options(), frozen=["tower"])
    checkpointer = Checkpointer(engine, output_dir, recipe_yaml="", save_total_limit=2, part_of=part_of)
    original = (path / "manifest.json").read_text()
    messages = {}

    def attempt(name: str, change) -> None:
        manifest = json.loads(original)
        change(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))
        try:
            checkpointer.load(path)
            messages[name] = "loaded"
        except SamtrainError as error:
            messages[name] = f"{type(error).__name__}: {error}"

    attempt("missing", lambda m: m["trainable"].pop("query"))
    attempt("extra", lambda m: m["trainable"].update({"adapter.weight": [2, 2]}))
    attempt("shape", lambda m: m["trainable"].update({"query": [1, 9]}))
    attempt("frozen", lambda m: m["frozen"].update({"tower.0.weight": [1.0, 2.0]}))
    attempt("whole", lambda m: None)
    fragments = path / "fragments-00000.safetensors"
    fragments.write_bytes(fragments.read_bytes()[:-100])
    attempt("truncated", lambda m: None)
    (path / "COMPLETE").unlink()
    attempt("torn", lambda m: None)
    messages["auto"] = str(find_resume(output_dir, "auto"))
    messages["complete"] = list(map(str, complete_checkpoints(Path(output_dir))))
    return messages


def held(options: dict) -> dict[str, float]:
    """Bytes that DeepSpeed holds on this rank after a step, each storage once, and what `zero_memory` says."""
    from samtrain.engine import zero
    from samtrain.engine.zero_memory import Parameter, memory_of_run

    options, device = TrainOptions.model_validate(options), torch.device("cpu")
    zero.init_distributed(device)
    with zero.partitioned_construction(options, device=device)():
        model = TinyModel()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("tower"))
    groups = build_parameter_groups(model.named_parameters(), options, lambda name: "projection")
    engine = zero.initialize(model, options=options, parameter_groups=groups, device=device)
    engine.backward(engine.forward(pack(1, [engine.rank])).loss_sum, is_last=True)
    tensors = {"weights": [p.ds_tensor for p in model.parameters()]}
    tensors["gradients"] = [engine._zero.grad_partitions_flat_buffer]
    masters = engine._zero.fp32_partitioned_groups_flat
    states = [engine._zero.optimizer.state[flat][name] for flat in masters for name in ("exp_avg", "exp_avg_sq")]
    tensors["optimizer"] = [*masters, *states]
    tensors["gradients"] += [flat.grad for flat in masters if flat.grad is not None]
    seen, found = set(), {}
    for kind, some in tensors.items():
        new = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in some}
        found[kind] = sum(size for storage, size in new.items() if storage not in seen)
        seen |= set(new)
    parameters = [Parameter(p.ds_numel, "", p.requires_grad, True) for p in model.parameters()]
    said = memory_of_run(parameters, options, world_size=engine.world_size, activations=0.0)
    return {"found": found, "said": vars(said)}


def main() -> None:
    rank, folder = CONFIG["rank"], Path(CONFIG["folder"])
    log = os.open(folder / f"log-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(CONFIG["world_size"]), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(CONFIG["port"]), LOCAL_SIZE=str(CONFIG["world_size"]),
    )  # fmt: skip
    try:
        scenarios = {"train": train, "oracle": oracle, "refusals": refusals, "multimodal": multimodal, "held": held}
        result = scenarios[CONFIG["scenario"]](**CONFIG["settings"])
        (folder / f"result-{rank}.json").write_text(json.dumps(result))
        code = 0
    except SamtrainError as error:
        traceback.print_exc()
        (folder / f"result-{rank}.json").write_text(json.dumps({"error": type(error).__name__, "message": str(error)}))
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


if __name__ == "__scenario__":
    main()
