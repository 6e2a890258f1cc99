"""The training loop: fetch a step, update, log, evaluate, save; stop when told to.

What a step computes is in `step.py`, what a checkpoint holds in `checkpoint.py`, extras are callbacks. Every decision
that leads to a collective call (log, evaluate, save, stop) follows from values that are equal on all ranks.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from samtrain.core.batch import GlobalStep, PackedBatch
from samtrain.core.distributed import all_gather_object
from samtrain.core.errors import Terminated, TrainingError
from samtrain.core.stopping import request_stop, stop_requested
from samtrain.engine.callbacks import Callback
from samtrain.engine.checkpoint import Checkpointer
from samtrain.engine.meter import Meter
from samtrain.engine.optimizer import learning_rate_factor
from samtrain.engine.options import TrainOptions
from samtrain.engine.state import TrainState
from samtrain.engine.step import StepCounts, run_step, warm_up
from samtrain.engine.watchdog import Watchdog
from samtrain.engine.zero import Engine

SPIKE_MEMORY = 0.9  # of the running mean the loss is compared with, per log line


class Trainer:
    """Trains `engine` from `state` to `total_steps` updates.

    Args:
        steps: this rank's share of every step, from the one after `state.cursor` on.
        evaluate: returns metrics, `eval/loss` among them; called on all ranks. It tells the watchdog what it does.
        warmup_batch: the largest batch of this rank, run once before the first step so that a lack of memory
            shows at once; all ranks give one or none.
    """

    def __init__(
        self,
        engine: Engine,
        steps: Iterable[GlobalStep],
        *,
        options: TrainOptions,
        total_steps: int,
        state: TrainState,
        callbacks: Sequence[Callback] = (),
        evaluate: Callable[[Watchdog], dict[str, float]] | None = None,
        checkpointer: Checkpointer,
        watchdog: Watchdog | None = None,
        warmup_batch: PackedBatch | None = None,
    ) -> None:
        self.engine = engine
        self.steps = iter(steps)
        self.options = options
        self.total_steps = total_steps
        self.state = state
        self.callbacks = list(callbacks)
        self.evaluate = evaluate
        self.checkpointer = checkpointer
        self.watchdog = watchdog or Watchdog(
            output_dir=checkpointer.output_dir, rank=engine.rank, timeout_seconds=options.timeout_seconds
        )
        self.warmup_batch = warmup_batch
        self.meter = Meter(device=engine.device, world_size=engine.world_size)
        self._saved_step: int | None = state.global_step or None  # a resumed state comes from its checkpoint
        self._evaluated: tuple[int, dict[str, float]] | None = None

    def fit(self) -> TrainState:
        """Run to the end.

        Raises:
            Terminated: SIGTERM or SIGINT reached any rank; a checkpoint of the last finished step was saved.
            TrainingError: the loss is not finite or leaps, or the data ended too early.
        """
        status = "failed"
        try:
            with self.watchdog, self._listening_for_signals(), self._settling_saves():
                self._start()
                while self.state.global_step < self.total_steps:
                    step = self._fetch()
                    counts, metrics = self._update(step)
                    self._report(step, counts, metrics)
                    if counts.saves_ended:
                        self._finish_save()
                    if self._is_due(self.options.eval_steps):
                        self._evaluate()
                    if self._is_due(self.options.save_steps):
                        self._save()
                    if counts.stop_requests:
                        self._save()
                        self._finish_save()
                        status = "terminated"
                        raise Terminated(
                            f"asked to stop: saved after step {self.state.global_step} of {self.total_steps}; "
                            "the run goes on with train.resume_from_checkpoint=auto"
                        )
                self._evaluate()
                self._save()
                self._finish_save()
                status = "finished"
        finally:
            for callback in self.callbacks:
                callback.on_train_end(self.state, status)
        return self.state

    # The moments of a step, in order.

    def _start(self) -> None:
        plan: dict[str, Any] = {
            "total_steps": self.total_steps,
            "first_step": self.state.global_step + 1,
            "world_size": self.engine.world_size,
            "device": str(self.engine.device),
            "precision": self.options.precision,
            "zero_stage": 3,
            "frozen_towers": self.options.zero.frozen_towers,
        }
        for callback in self.callbacks:
            callback.on_train_start(self.state, plan)
        self.engine.module.train()
        self.checkpointer.prepare()
        if self.warmup_batch is not None:
            warm_up(self.engine, self.warmup_batch, watchdog=self.watchdog)
            self.warmup_batch = None
        self.meter = Meter(device=self.engine.device, world_size=self.engine.world_size)

    def _fetch(self) -> GlobalStep:
        self.watchdog.enter("data", step=self.state.global_step + 1)
        since = time.perf_counter()
        try:
            step = next(self.steps)
        except StopIteration:
            raise TrainingError(
                f"the data ended after step {self.state.global_step} of {self.total_steps}; the loader must go on"
            ) from None
        self.meter.add_wait(time.perf_counter() - since)
        return step

    def _update(self, step: GlobalStep) -> tuple[StepCounts, dict[str, float]]:
        """One update; returns the step's counts and, where a log line is due, its metrics."""
        number = self.state.global_step + 1
        factor = learning_rate_factor(self.state.global_step, self.options, self.total_steps)
        self.engine.set_learning_rate(factor)
        result = run_step(
            self.engine,
            step,
            step_number=number,
            watchdog=self.watchdog,
            stop_requested=stop_requested(),
            save_has_news=self.checkpointer.has_news,
        )
        self.meter.add_step(result.loss_sum, result.counts)
        self._advance(step, result.counts)
        if number % self.options.logging_steps and number != self.total_steps:
            return result.counts, {}
        metrics = self.meter.close()
        metrics["train/grad_norm"] = self.engine.grad_norm
        metrics["train/learning_rate"] = self.options.learning_rate * factor
        self._check_loss(step, metrics["train/loss"])
        return result.counts, metrics

    def _advance(self, step: GlobalStep, counts: StepCounts) -> None:
        self.state.global_step += 1
        self.state.cursor = step.cursor
        self.state.num_samples += counts.samples
        self.state.num_images += counts.images
        self.state.num_tokens += counts.tokens
        self.state.num_label_tokens += counts.label_tokens
        self.state.num_skipped += counts.skipped

    def _check_loss(self, step: GlobalStep, loss: float) -> None:
        """A wrong run stops early and names its samples."""
        limit, mean = self.options.max_loss_spike, self.state.mean_loss
        keys = f"keys of the step: {', '.join(step.keys)}"
        if not math.isfinite(loss):
            raise TrainingError(f"step {self.state.global_step}: train/loss is {loss}; {keys}")
        if limit is not None and mean is not None and loss > limit * mean:
            raise TrainingError(
                f"step {self.state.global_step}: train/loss {loss:.4f} is more than {limit:g} x its running mean "
                f"{mean:.4f} (train.max_loss_spike); {keys}"
            )
        self.state.mean_loss = loss if mean is None else SPIKE_MEMORY * mean + (1 - SPIKE_MEMORY) * loss

    def _report(self, step: GlobalStep, counts: StepCounts, metrics: dict[str, float]) -> None:
        skipped: dict[str, str] = {}
        if counts.skipped:  # equal on all ranks, so that all or none gather
            for found in all_gather_object(step.skipped):
                skipped.update(found)
        for callback in self.callbacks:
            callback.on_step_end(self.state, step, metrics, skipped)

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.state.global_step % every == 0

    def _evaluate(self) -> None:
        if self.evaluate is None or (self._evaluated is not None and self._evaluated[0] == self.state.global_step):
            return
        with self._pause():
            metrics = self.evaluate(self.watchdog)
            self._evaluated = (self.state.global_step, metrics)
            for callback in self.callbacks:
                callback.on_evaluate(self.state, metrics)

    def _save(self) -> None:
        """Begin to save, unless this step is; the save before is finished first."""
        if self._saved_step == self.state.global_step:
            return
        self._finish_save()
        with self._pause_for_save():
            self._note_best()
            for callback in self.callbacks:
                callback.before_save(self.state)
            self.checkpointer.begin(self.state)
            self._saved_step = self.state.global_step

    def _finish_save(self) -> None:
        """Wait until the save under way, if there is one, is complete."""
        with self._pause_for_save():
            saved = self.checkpointer.finish()
        if saved is not None:
            for callback in self.callbacks:
                callback.on_save(saved)

    def _note_best(self) -> None:
        """The checkpoint about to be saved is the best if it was evaluated and no other has a lower eval/loss."""
        step, metrics = self._evaluated or (-1, {})
        loss = metrics.get("eval/loss")
        if step != self.state.global_step or loss is None:
            return
        if self.state.best_metric is None or loss < self.state.best_metric:
            self.state.best_metric, self.state.best_step = loss, step

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Neither timed by the watchdog, unless a phase is entered, nor counted as training time."""
        self.watchdog.rest()
        since = time.perf_counter()
        yield
        self.meter.add_pause(time.perf_counter() - since)

    @contextmanager
    def _pause_for_save(self) -> Iterator[None]:
        since = time.perf_counter()
        with self._pause():
            self.watchdog.enter("save", step=self.state.global_step)
            yield
            self.watchdog.rest()
        self.meter.add_checkpoint_stall(time.perf_counter() - since)

    @contextmanager
    def _settling_saves(self) -> Iterator[None]:
        """An error of training does not cost the checkpoint that was begun before it."""
        try:
            yield
        except Exception:
            self.watchdog.enter("save", step=self.state.global_step)
            self.checkpointer.settle()
            raise

    @contextmanager
    def _listening_for_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C set the flag of `core.stopping`, on which the ranks agree in the next step.

        A second Ctrl-C ends at once. Only the main thread may install handlers; a Ray worker trains in another one,
        and its launcher sets the flag.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            if number == signal.SIGINT and stop_requested():
                raise KeyboardInterrupt
            request_stop()

        previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
