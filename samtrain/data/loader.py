"""Loaders: endless training steps with a cursor, evaluation steps, and single samples for generation.

Steps are built ahead, in order, by one thread that plans, `num_workers` threads that decode (without the GIL), and one
that collates; the next step is planned while this one is decoded, so that the decoders never run dry. At most
`prefetch_steps` steps are under way or wait; the cursor counts what was handed out, never what was built ahead. The
ranks agree on a step when it is handed out (agree.py).
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Any, Generic, TypeVar

from PIL import Image

from samtrain.core.batch import GlobalStep
from samtrain.core.errors import ConfigError
from samtrain.core.sample import SampleEncoder, SampleRecord
from samtrain.data.agree import StepAccounts, agree
from samtrain.data.decode import decode_image
from samtrain.data.index import ShardIndex
from samtrain.data.mixture import SampleSet, sample_order
from samtrain.data.options import DataOptions
from samtrain.data.order import Slot
from samtrain.data.step import BuiltStep, Map, StepBuilder

Built = TypeVar("Built")


class StepStream(Generic[Built]):
    """Calls `begin(n, map_function)()` for n = 0, 1, ... ahead of the consumer, in order.

    Args:
        begin: starts a step; what it returns finishes it. Both are called in order, each in a thread of its own.
        num_steps: where to end; None: never.
        num_workers: threads behind `map_function`; 0 builds each step when it is asked for, in the caller's thread.
    """

    def __init__(
        self,
        begin: Callable[[int, Map], Callable[[], Built]],
        *,
        num_steps: int | None,
        num_workers: int,
        prefetch_steps: int,
    ) -> None:
        self._begin = begin
        self._num_steps = num_steps
        self._prefetch_steps = prefetch_steps
        self._next = 0
        self._waiting: deque[Future[Built]] = deque()
        self._planner: ThreadPoolExecutor | None = None
        if num_workers:
            self._planner = ThreadPoolExecutor(1, thread_name_prefix="samtrain-steps")
            self._finisher = ThreadPoolExecutor(1, thread_name_prefix="samtrain-collate")
            self._workers = ThreadPoolExecutor(num_workers, thread_name_prefix="samtrain-decode")

    def __iter__(self) -> Iterator[Built]:
        return self

    def __next__(self) -> Built:
        """The next step; an error of any thread is raised here."""
        if self._planner is None:
            if self._next == self._num_steps:
                raise StopIteration
            self._next += 1
            return self._begin(self._next - 1, map)()
        while len(self._waiting) < self._prefetch_steps and self._next != self._num_steps:
            begun = self._planner.submit(self._begin, self._next, self._workers.map)
            self._waiting.append(self._finisher.submit(_finish, begun))
            self._next += 1
        if not self._waiting:
            raise StopIteration
        return self._waiting.popleft().result()

    def run(self, function: Callable[[Map], Built]) -> Built:
        """Call `function(map_function)` after all steps that were asked for; nothing else is built meanwhile."""
        if self._planner is None:
            return function(map)
        return self._finisher.submit(function, self._workers.map).result()

    def close(self) -> None:
        """End all threads; returns when they are gone."""
        for future in self._waiting:
            future.cancel()
        self._waiting.clear()
        if self._planner is not None:
            self._workers.shutdown(wait=True, cancel_futures=True)
            self._planner.shutdown(wait=True, cancel_futures=True)
            self._finisher.shutdown(wait=True, cancel_futures=True)


def _finish(begun: Future[Callable[[], Built]]) -> Built:
    return begun.result()()


class TrainLoader:
    """Endless iterator of this rank's `GlobalStep`s, epoch after epoch; a context manager that ends its threads.

    A step holds the same samples for any number of ranks and workers, and uses and skips the same ones.

    Raises:
        ConfigError: fewer samples in a step than ranks.
    """

    def __init__(
        self,
        index: SampleSet,
        encoder: SampleEncoder,
        options: DataOptions,
        *,
        global_batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        if global_batch_size < world_size:
            raise ConfigError(
                f"train.global_batch_size is {global_batch_size} but there are {world_size} ranks: some would never "
                f"get a sample; raise it or use fewer processes"
            )
        self.options = options
        self.order = sample_order(index, options, seed=seed, global_batch_size=global_batch_size)
        self._builder = StepBuilder(
            index,
            encoder,
            options,
            seed=seed,
            rank=rank,
            world_size=world_size,
            augment=options.augment,
            reduced_decode=options.reduced_decode,
        )
        self._position = 0  # samples handed out, over all ranks
        self._stream: StepStream[BuiltStep] | None = None
        self._is_closed = False
        self._accounts = StepAccounts(self._builder, max_bad_fraction=options.max_bad_fraction)

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    @property
    def cursor(self) -> dict[str, Any]:
        """State after the last step that was handed out."""
        return self.order.cursor(self._position) | {"bad": self._accounts.state()}

    def load_cursor(self, cursor: dict[str, Any]) -> None:
        """Continue after the step `cursor` was taken from; what was built ahead is dropped.

        Raises:
            CheckpointError: the cursor is of another set, seed, order or batch size.
        """
        position = self.order.position(cursor)
        self._end_stream()
        self._accounts.load_state(
            cursor.get("bad"),
            num_seen=position,
            tried=self.order.times_met(position),
            retry_quarantined=self.options.retry_quarantined,
        )
        self._position = position

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> GlobalStep:
        """The next step; all ranks ask for it together.

        Raises:
            DataError: a sample exceeds the budgets.
            TrainingError: more than `max_bad_fraction` of the samples could not be used.
        """
        if self._is_closed:
            raise RuntimeError("this loader was closed")
        if self._stream is None:
            self._stream = self._start_stream(self._position)
        try:
            step = _hand_out(next(self._stream), self._stream, self._builder, self._accounts)
        except BaseException:
            self._end_stream()
            raise
        self._position += self.order.global_batch_size
        return step

    def close(self) -> None:
        """End all threads; the loader cannot be used afterwards."""
        self._is_closed = True
        self._end_stream()

    def __enter__(self) -> "TrainLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start_stream(self, start: int) -> StepStream[BuiltStep]:
        builder, order = self._builder, self.order

        def begin(step: int, map_function: Map) -> Callable[[], BuiltStep]:
            position = start + step * order.global_batch_size
            cursor = order.cursor(position + order.global_batch_size)
            return builder.begin(order.slots(position), cursor=cursor, map_function=map_function)

        return StepStream(
            begin,
            num_steps=None,
            num_workers=self.options.num_workers,
            prefetch_steps=self.options.prefetch_steps,
        )

    def _end_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _hand_out(
    built: BuiltStep, stream: StepStream[BuiltStep], builder: StepBuilder, accounts: StepAccounts
) -> GlobalStep:
    """The step as all ranks agree on it; built again here where another rank cannot use all its samples."""

    def rebuild(step: BuiltStep, excluded: Mapping[int, str]) -> BuiltStep:
        return stream.run(
            lambda map_function: builder.begin(
                step.slots, cursor=step.cursor, map_function=map_function, excluded=excluded
            )()
        )

    # Every rank knows the same quarantine here, however many steps were built before it did.
    left_out = accounts.left_out(built)
    if left_out:
        again = rebuild(built, built.unusable | left_out)
        built = replace(again, quarantined=built.quarantined | again.quarantined)
    return accounts.close(agree(built, rebuild))


def evaluation_steps(
    index: ShardIndex,
    encoder: SampleEncoder,
    options: DataOptions,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[GlobalStep]:
    """Every sample once, in the set's order, without augmentation; equally many steps and micro-batches on each rank.

    Args:
        batch_size: samples of one step over all ranks; the last step may have fewer.

    Samples that cannot be used are skipped and logged.
    """
    builder = StepBuilder(index, encoder, options, seed=0, rank=rank, world_size=world_size, augment=False)

    accounts = StepAccounts(builder, max_bad_fraction=None)

    def begin(step: int, map_function: Map) -> Callable[[], BuiltStep]:
        stop = min(len(index), (step + 1) * batch_size)
        slots = [Slot(0, i) for i in range(step * batch_size, stop)]
        return builder.begin(slots, cursor={"position": stop}, map_function=map_function)

    stream = StepStream(
        begin,
        num_steps=-(-len(index) // batch_size),
        num_workers=options.num_workers,
        prefetch_steps=options.prefetch_steps,
    )
    try:
        for built in stream:
            yield _hand_out(built, stream, builder, accounts)
    finally:
        stream.close()


def read_for_generation(index: ShardIndex, i: int, options: DataOptions) -> tuple[SampleRecord, list[Image.Image]]:
    """Sample `i` with its images decoded to RGB, not resized, not augmented.

    Raises:
        DataError: record or image cannot be used.
    """
    record, images = index.read_sample(i)
    return record, [
        decode_image(data, max_pixels=options.max_image_pixels, where=reference.file)
        for data, reference in zip(images, record.images)
    ]
