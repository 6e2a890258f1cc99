"""Model FLOPs utilization: real work over the step's time and the device's peak, overall and per part."""

from collections import Counter
from collections.abc import Callable

from samtrain.core.batch import GlobalStep, PackedBatch
from samtrain.engine.callbacks.base import Callback
from samtrain.engine.state import TrainState


class Utilization(Callback):
    """Adds perf/mfu and perf/mfu_<part> to the metrics of a log line; stands before the callbacks that read them.

    Counted on this rank's samples, packs are dealt to ranks by cost. The parts share the step's time, so they add up
    to perf/mfu.

    Args:
        work_of: part -> floating-point operations of a micro-batch, forward and backward; read on the host.
        peak_tflops: of this device, in the precision that trains.
    """

    def __init__(self, work_of: Callable[[PackedBatch], dict[str, float]], *, peak_tflops: float) -> None:
        self._work_of = work_of
        self._peak = peak_tflops * 1e12
        self._work: Counter[str] = Counter()
        self._num_steps = 0

    def on_step_end(
        self, state: TrainState, step: GlobalStep, metrics: dict[str, float], skipped: dict[str, str]
    ) -> None:
        for batch in step.micro_batches:
            self._work.update(self._work_of(batch))
        self._num_steps += 1
        if not metrics:
            return
        available = metrics["perf/step_seconds"] * self._num_steps * self._peak
        metrics["perf/mfu"] = sum(self._work.values()) / available
        for part, work in self._work.items():
            metrics[f"perf/mfu_{part}"] = work / available
        self._work.clear()
        self._num_steps = 0
