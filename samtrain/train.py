"""The composition root: the one file that knows every part, and puts them together to a run.

`run_worker` runs in every process, started by the launcher (Ray or local) or by torchrun: it trains, exports what was
trained as a Hugging Face folder, generates and scores the held-out splits, and leaves one finished tracking run.
"""

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from samtrain.core import distributed
from samtrain.core.batch import GlobalStep
from samtrain.core.errors import Terminated
from samtrain.core.events import Emit, message
from samtrain.core.files import atomic_write_json
from samtrain.core.host_memory import return_freed_blocks
from samtrain.core.log import configure_logging
from samtrain.core.peak import peak_tflops
from samtrain.core.precision import exact_float32
from samtrain.core.seeds import derive_seed, seed_everything
from samtrain.core.versions import git_commit, versions
from samtrain.data.ledger import Ledger
from samtrain.data.loader import TrainLoader, evaluation_steps
from samtrain.data.mixture import load_split, open_training_set, sources_of
from samtrain.data.preflight import largest_pack
from samtrain.data.storage import parse_location
from samtrain.engine import zero
from samtrain.engine.callbacks import Callback, Metrics, Progress, Utilization
from samtrain.engine.checkpoint import Checkpointer
from samtrain.engine.checkpoint_folder import FINISHED_FILE, find_resume
from samtrain.engine.evaluate import evaluate_loss
from samtrain.engine.optimizer import build_parameter_groups
from samtrain.engine.state import TrainState
from samtrain.engine.trainer import Trainer
from samtrain.engine.watchdog import Watchdog
from samtrain.evaluation.context_gain import ContextGain
from samtrain.evaluation.evaluator import EvaluationResult, evaluate_splits
from samtrain.evaluation.metrics import Scores
from samtrain.generation.export import export_folder, load_exported
from samtrain.model.build import BuiltModel, build_model, build_processor
from samtrain.model.flops import FlopCounter
from samtrain.model.freezing import part_of, trainable_counts
from samtrain.model.lora import merged_for_export
from samtrain.recipe import Recipe, parse_recipe
from samtrain.tracking.curves import curves_figure
from samtrain.tracking.jsonl import FILE_NAME, JsonlLog, read_rows
from samtrain.tracking.mlflow_tracker import MlflowTracker
from samtrain.tracking.protocol import NullTracker, RunStatus, Tracker

MODEL_FOLDER = "model"
LEDGER_FILE = "ledger.jsonl"
PREDICTIONS_FOLDER = "predictions"
TRACKING_FOLDER = "tracking"


def run_worker(recipe_yaml: str, *, emit: Emit) -> dict[str, Any]:
    """Run a resolved recipe in this process; RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set.

    Args:
        emit: hears what rank 0 has to say; ignored on the others.

    Returns:
        On every rank {"status": "finished", "summary_rows": [[name, value], ...]}.

    Raises:
        Terminated: after SIGTERM; a checkpoint was saved.
    """
    recipe = parse_recipe(recipe_yaml, source="the resolved recipe")
    device = _device(recipe)
    configure_logging(rank=int(os.environ.get("RANK", "0")))
    disable_progress_bar()  # of transformers: the launcher shows the run's own progress
    exact_float32()
    if device.type == "cuda":
        return_freed_blocks()
    zero.init_distributed(device, timeout_seconds=recipe.train.timeout_seconds)
    seed_everything(derive_seed(recipe.seed, "rank", distributed.rank()))
    return _Run(recipe, device=device, emit=emit).execute()


def _device(recipe: Recipe) -> torch.device:
    wants_gpu = recipe.launch.device == "cuda" or (recipe.launch.device == "auto" and torch.cuda.is_available())
    if wants_gpu:
        # Ray shows every worker its own GPU only; elsewhere all of them are visible.
        visible = torch.cuda.device_count()
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % max(1, visible))
    torch.set_num_threads(recipe.launch.cpus_per_worker)
    return torch.device("cpu")


class _Run:
    """One process's part of a run, from the model to the summary."""

    def __init__(self, recipe: Recipe, *, device: torch.device, emit: Emit) -> None:
        self.recipe = recipe
        self.device = device
        self.emit = emit
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.is_main = self.rank == 0
        self.output_dir = Path(recipe.output_dir)
        self.processor = build_processor(recipe.model, image_size=recipe.data.image_size)
        # A new run wants every shard; one that is restarted goes on without those that broke meanwhile.
        self.restarts = find_resume(self.output_dir, recipe.train.resume_from_checkpoint) is not None
        self.index = open_training_set(recipe.data, tolerate_broken_shards=self.restarts)
        self.tracker: Tracker = NullTracker()
        self.started = time.time()

    def execute(self) -> dict[str, Any]:
        engine = self._build_engine()
        checkpointer = Checkpointer(
            engine,
            self.output_dir,
            recipe_yaml=self.recipe.to_yaml(),
            save_total_limit=self.recipe.train.save_total_limit,
            part_of=part_of,
        )
        state = self._resume(checkpointer)
        with self._tracking(state):
            self._log_run(engine)
            state = self._train(engine, checkpointer, state)
            trained_seconds = time.time() - self.started
            self._export(engine)
            del engine, checkpointer  # the exported copy is evaluated: make room for it
            gc.collect()
            result = self._evaluate(state.global_step)
            return self._finish(state, result, trained_seconds=trained_seconds)

    # Before training.

    def _build_engine(self) -> zero.Engine:
        recipe = self.recipe
        built = build_model(
            recipe.model,
            dtype=zero.DTYPES[recipe.train.precision],
            seed=recipe.seed,
            construction=zero.partitioned_construction(recipe.train, device=self.device),
            gather=zero.gathered,
            device_type=self.device.type,
        )
        self._say_parts(built)
        model, self.config, self.choices = built.model, built.model.config, built.choices
        if recipe.train.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.counts = trainable_counts(model)
        groups = build_parameter_groups(model.named_parameters(), recipe.train, part_of)
        return zero.initialize(model, options=recipe.train, parameter_groups=groups, device=self.device)

    def _say_parts(self, built: BuiltModel) -> None:
        if not self.is_main:
            return
        rows = [
            [part, f"{trainable:,} of {total:,} parameters train"]
            for part, (trainable, total) in trainable_counts(built.model).items()
        ]
        rows += built.choices.rows(self.recipe.model) + built.report.summary()
        self.emit({"kind": "plan", "title": "parts", "rows": rows})

    def _resume(self, checkpointer: Checkpointer) -> TrainState:
        path = find_resume(self.output_dir, self.recipe.train.resume_from_checkpoint)
        return checkpointer.load(path) if path else TrainState()

    @contextmanager
    def _tracking(self, state: TrainState) -> Iterator[None]:
        """The tracking run; FINISHED, KILLED or FAILED is decided by how this context is left."""
        if self.is_main:
            self.tracker = MlflowTracker(
                self.recipe.tracking,
                run_name=self.recipe.name,
                spool_folder=self.output_dir / TRACKING_FOLDER,
                default_store=self.output_dir.parent,
                run_id=state.tracker_run_id,
                resume=state.global_step > 0,
                emit=self.emit,
            )
        status: RunStatus = "FAILED"
        try:
            yield
            status = "FINISHED"
        except (Terminated, KeyboardInterrupt):
            status = "KILLED"
            raise
        except BaseException as error:
            self.tracker.set_tags({"samtrain.error": f"{type(error).__name__}: {error}"[:4000]})
            raise
        finally:
            self.tracker.finish(status)

    def _log_run(self, engine: zero.Engine) -> None:
        recipe = self.recipe
        self.tracker.log_params(recipe.model_dump(mode="json"))
        for part, (trainable, total) in self.counts.items():
            self.tracker.log_params({f"parameters/{part}/trainable": trainable, f"parameters/{part}/total": total})
        self.tracker.log_params({f"versions/{name}": version for name, version in versions().items()})
        self.tracker.set_tags({"samtrain.commit": git_commit(), "samtrain.output_dir": str(self.output_dir)})
        run = {"world_size": engine.world_size, "device": str(self.device)}
        self.tracker.log_params(run | self.choices.to_dict())
        self.tracker.log_text(recipe.to_yaml(), "recipe.yaml")
        for source in sources_of(self.index).values():
            name, path = "/".join(source.folder.parts[-2:]), str(source.folder)
            self.tracker.log_dataset(name=name, digest=source.digest, path=path, num_samples=len(source))

    # Training.

    def _train(self, engine: zero.Engine, checkpointer: Checkpointer, state: TrainState) -> TrainState:
        recipe = self.recipe
        with ExitStack() as stack:
            loader = stack.enter_context(
                TrainLoader(
                    self.index,
                    self.processor,
                    recipe.data,
                    global_batch_size=recipe.train.global_batch_size,
                    seed=recipe.seed,
                    rank=self.rank,
                    world_size=self.world_size,
                )
            )
            if state.global_step:
                loader.load_cursor(state.cursor)
            trainer = Trainer(
                engine,
                loader,
                options=recipe.train,
                total_steps=recipe.total_steps(loader.steps_per_epoch),
                state=state,
                callbacks=self._callbacks(stack, state),
                evaluate=self._validation(engine, state),
                checkpointer=checkpointer,
                warmup_batch=largest_pack(self.index, self.processor, recipe.data),
            )
            return trainer.fit()

    def _callbacks(self, stack: ExitStack, state: TrainState) -> list[Callback]:
        """Rank 0 watches; the others train."""
        if not self.is_main:
            return []
        resumed = state.global_step or None
        ledger = stack.enter_context(Ledger.open(self.output_dir / LEDGER_FILE, resume_step=resumed))
        log = JsonlLog(self.output_dir / FILE_NAME, resumed_step=resumed)
        stack.callback(log.close)

        def log_metrics(metrics: dict[str, float], step: int) -> None:
            log.log_metrics(metrics, step=step)
            self.tracker.log_metrics(metrics, step=step)

        watchers = [_TrackRunId(self.tracker), _WriteLedger(ledger), Metrics(log_metrics), Progress(self.emit)]
        return [self._utilization(), *watchers]

    def _utilization(self) -> Utilization:
        flops = FlopCounter(self.config, self.recipe.model.train, image_size=self.recipe.data.image_size)
        peak, source = peak_tflops(self.device, zero.DTYPES[self.recipe.train.precision])
        self.tracker.log_params({"peak_tflops": peak, "peak_tflops_source": source})
        return Utilization(flops.batch, peak_tflops=peak)

    def _validation(self, engine: zero.Engine, state: TrainState) -> Callable[[Watchdog], dict[str, float]] | None:
        recipe = self.recipe
        if recipe.data.validation_split is None:
            return None
        index = load_split(
            recipe.data.path,
            recipe.data.validation_split,
            key="data.path",
            remote=recipe.data.remote,
            tolerate_broken_shards=self.restarts,
        )

        def validate(watchdog: Watchdog) -> dict[str, float]:
            steps = evaluation_steps(
                index,
                self.processor,
                recipe.data,
                batch_size=recipe.train.global_batch_size,
                rank=self.rank,
                world_size=self.world_size,
            )
            return evaluate_loss(engine, steps, watchdog=watchdog, step_number=state.global_step)

        return validate

    # After training.

    def _export(self, engine: zero.Engine) -> None:
        if self.is_main:
            self.emit(message(f"exporting the model to {self.output_dir / MODEL_FOLDER}"))
        export_folder(
            self.config,
            self.processor,
            merged_for_export(engine.module, zero.consolidated(engine.module)),
            self.output_dir / MODEL_FOLDER,
            dtype=zero.DTYPES[self.recipe.train.precision],
            generation=self.recipe.generation,
        )
        distributed.barrier()

    def _evaluate(self, step: int) -> EvaluationResult | None:
        """The exported model on every held-out split; all ranks generate."""
        recipe = self.recipe
        if not recipe.evaluation.splits:
            return None
        model, processor = load_exported(
            self.output_dir / MODEL_FOLDER, device=self.device, dtype=zero.DTYPES[recipe.train.precision]
        )
        result = evaluate_splits(
            model,
            processor,
            {split: parse_location(recipe.data.path) / split for split in recipe.evaluation.splits},
            options=recipe.evaluation,
            generation=recipe.generation,
            data=recipe.data,
            train=self.index,
            emit=self.emit,
        )
        if self.is_main:
            result.write(self.output_dir / PREDICTIONS_FOLDER)
            self.emit(result.event(title="held-out scores of the exported model"))
            if result.context_gain:
                self.emit(result.context_gain_event())
            with closing(JsonlLog(self.output_dir / FILE_NAME, resumed_step=step)) as log:
                log.log_metrics(result.metrics(), step=step)
            self.tracker.log_metrics(result.metrics(), step=step)
            self.tracker.log_examples(result.examples, artifact_file="examples.json")
        return result

    def _finish(self, state: TrainState, result: EvaluationResult | None, *, trained_seconds: float) -> dict[str, Any]:
        """Rank 0 leaves plots, ledger, model and the marker of a finished run; the summary says where things are."""
        rows = self._summary_rows(state, result, trained_seconds)
        if self.is_main:
            figure = curves_figure(read_rows(self.output_dir / FILE_NAME), title=self.recipe.name)
            figure.savefig(self.output_dir / "curves.png", dpi=120)
            for name in (LEDGER_FILE, FILE_NAME, "curves.png"):
                self.tracker.log_artifact(self.output_dir / name)
            if self.recipe.tracking.log_model:
                self.tracker.log_model_folder(self.output_dir / MODEL_FOLDER)
            finished = {"train_state": state.to_dict(), "scores": result.to_dict() if result else None}
            atomic_write_json(self.output_dir / FINISHED_FILE, finished)
        return {"status": "finished", "summary_rows": rows}

    def _summary_rows(
        self, state: TrainState, result: EvaluationResult | None, trained_seconds: float
    ) -> list[list[str]]:
        total = time.time() - self.started
        rows = [
            ["trained", f"{state.global_step} steps, {state.num_samples} samples in {trained_seconds / 60:.1f} min"],
            ["in all", f"{total / 60:.1f} min with export and evaluation"],
        ]
        if state.best_metric is not None:
            rows.append(["validation loss", f"{state.best_metric:.4f} at step {state.best_step}"])
        if result is not None:
            for name in ("cider", "rouge_l", "bleu_4"):
                ours, majority = (_mean(scores, name) for scores in (result.scores, result.majority_scores))
                against = f" (always the majority answer: {majority:.2f})" if result.majority_scores else ""
                rows.append([f"mean {name} of {len(result.scores)} sets", f"{ours:.2f}{against}"])
            if result.context_gain:
                rows.append([f"context gain of {len(result.context_gain)} sets", _mean_gains(result.context_gain)])
            rows += [[row.key, f"{row.prediction}  [reference: {row.reference}]"] for row in result.rows[:4]]
            rows.append(["all predictions", str(self.output_dir / PREDICTIONS_FOLDER)])
        rows += [
            ["model", f"{self.output_dir / MODEL_FOLDER} (a Hugging Face folder)"],
            ["curves", str(self.output_dir / "curves.png")],
            ["tracking", f"run {self.tracker.run_id}; `make ui` opens MLflow"],
            ["try it", f'samtrain generate {self.output_dir / MODEL_FOLDER} IMAGE IMAGE ... --prompt "..."'],
        ]
        return rows


def _mean(scores: dict[str, Scores], metric: str) -> float:
    return sum(float(getattr(one, metric)) for one in scores.values()) / max(1, len(scores))


def _mean_gains(gains: dict[str, ContextGain]) -> str:
    shuffled = [gain.gain_shuffled for gain in gains.values() if gain.gain_shuffled is not None]
    text = f"{sum(gain.gain_none for gain in gains.values()) / len(gains):+.4f} over none"
    if shuffled:
        text += f", {sum(shuffled) / len(shuffled):+.4f} over a shuffled context"
    return f"{text} (nats per label token, mean of the sets)"


class _TrackRunId(Callback):
    """Every checkpoint knows the tracking run it belongs to, as soon as the server has named it."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def on_step_end(
        self, state: TrainState, step: GlobalStep, metrics: dict[str, float], skipped: dict[str, str]
    ) -> None:
        state.tracker_run_id = self.tracker.run_id


class _WriteLedger(Callback):
    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def on_step_end(
        self, state: TrainState, step: GlobalStep, metrics: dict[str, float], skipped: dict[str, str]
    ) -> None:
        self.ledger.record(state.global_step, step.keys, skipped, quarantined=step.quarantined)

    def before_save(self, state: TrainState) -> None:
        self.ledger.sync()


if __name__ == "__main__":  # under torchrun: `torchrun --nproc-per-node 8 -m samtrain.train RECIPE [key=value ...]`
    from samtrain.launch.progress_display import ProgressDisplay, make_console
    from samtrain.recipe import load_recipe

    with ProgressDisplay(make_console()) as display:
        run_worker(load_recipe(sys.argv[1], sys.argv[2:]).to_yaml(), emit=display.handle)
