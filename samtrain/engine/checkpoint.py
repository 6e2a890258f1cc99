"""Our own checkpoints: exact, complete or invisible, free of pickle, loadable on any number of ranks.

    fragments-<rank>.safetensors   fp32 master values and Adam's moments of every trainable parameter
    rng-<rank>.json                the state of every random generator
    manifest.json                  trainable names and shapes, world size, Adam's step, sums of the frozen parameters
    state.json                     TrainState (with data cursor and tracking run), versions, commit
    recipe.yaml                    the resolved recipe
    COMPLETE                       written last

Training stands still while the state is copied to host memory, and goes on while threads write it (`host_copy.py`,
`background_save.py`). All ranks write into a hidden folder, which gets its name when all of it is on disk; output_dir
must be a folder that every rank sees. DeepSpeed's universal checkpoint drops frozen parameters in silence; here they
are not stored but reloaded from their source, and their sums must agree with those that were saved.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samtrain.core import distributed
from samtrain.core.errors import CheckpointError, SamtrainError, TrainingError
from samtrain.core.files import atomic_write, atomic_write_json, fsync_directory
from samtrain.core.log import logger
from samtrain.core.seeds import rng_state, set_rng_state
from samtrain.core.versions import git_commit, versions
from samtrain.engine import checkpoint_folder
from samtrain.engine.background_save import BackgroundSave
from samtrain.engine.fragments import check_manifest, read_fragments, write_tensors
from samtrain.engine.host_copy import HostCopy
from samtrain.engine.state import SavedCheckpoint, TrainState
from samtrain.engine.zero import Engine

FORMAT = 1
BYTES_PER_ELEMENT = 12  # fp32 master, exp_avg, exp_avg_sq
GRACE_SECONDS = 30.0  # for the other ranks' files, where training has failed
FROZEN_TOLERANCE = 1e-9  # float64 sums in another order differ by 1e-15 of the sum of absolute values


@dataclass(frozen=True)
class _UnderWay:
    state: TrainState
    final: Path
    partial: Path
    thread: BackgroundSave
    since: float
    stall_seconds: float

    @property
    def failure(self) -> str:
        return f"{self.final} could not be saved; the checkpoints before it are whole"


class Checkpointer:
    """Saves and loads `engine` below `output_dir`; every method but `settle` is a collective.

    A save is begun, and finished some steps later; one at a time.
    """

    def __init__(
        self,
        engine: Engine,
        output_dir: str | Path,
        *,
        recipe_yaml: str,
        save_total_limit: int,
        part_of: Callable[[str], str],
    ) -> None:
        self.engine = engine
        self.output_dir = Path(output_dir)
        self.recipe_yaml = recipe_yaml
        self.save_total_limit = save_total_limit
        self.part_of = part_of
        self._frozen: dict[str, tuple[float, float]] | None = None
        self._host_copy: HostCopy | None = None
        self._under_way: _UnderWay | None = None

    def prepare(self) -> None:
        """What the first save would otherwise keep training waiting for: sums of frozen weights, host memory."""
        self._frozen_checksums()
        with _all_or_none("no host memory for a checkpoint"):
            self._buffers()

    def begin(self, state: TrainState) -> None:
        """Copy the state of `state.global_step` and start to write it; no other save is under way.

        Raises:
            TrainingError: on every rank, where the disk is full already or output_dir is not shared.
        """
        assert self._under_way is None, "finish the save before"
        since = time.perf_counter()
        step, rank = state.global_step, self.engine.rank
        final = checkpoint_folder.checkpoint_path(self.output_dir, step)
        partial = checkpoint_folder.partial_path(self.output_dir, step)
        frozen = self._frozen_checksums()
        failure = f"{final} could not be saved; the checkpoints before it are whole"
        with _all_or_none(failure):
            if rank == 0:
                self._check_disk()
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with _all_or_none(failure, clean_up=partial):
            if not partial.is_dir():
                raise TrainingError(f"{partial}: rank {rank} does not see it; output_dir must be a folder all share")
            copy, generators = self._buffers(), json.dumps(rng_state())
            copy.take(self.engine.fragments())
            manifest = self._manifest(frozen)
        state = TrainState.from_dict(state.to_dict())

        def write() -> None:
            write_tensors(partial, copy.tensors, rank=rank)
            # Last: who sees it knows that all of this rank's files are on disk.
            atomic_write(partial / checkpoint_folder.generators_file(rank), generators)

        def is_written_by_all() -> bool:
            # From the last: it is the one most often still missing, and one look is enough then.
            ranks = reversed(range(self.engine.world_size))
            return all((partial / checkpoint_folder.generators_file(one)).is_file() for one in ranks)

        def publish() -> None:
            self._write_descriptions(partial, state, manifest)
            self._publish(partial, final)
            best = state.best_step
            checkpoint_folder.remove_old(self.output_dir, keep=self.save_total_limit, newest=step, best=best)

        if rank == 0:
            thread = BackgroundSave(write, is_written_by_all=is_written_by_all, publish=publish)
        else:
            thread = BackgroundSave(write)
        self._under_way = _UnderWay(state, final, partial, thread, since, time.perf_counter() - since)

    @property
    def has_news(self) -> bool:
        """This rank knows how the save under way has ended; where one does, all should call `finish`. No collective."""
        return self._under_way is not None and self._under_way.thread.has_news

    def finish(self) -> SavedCheckpoint | None:
        """Wait until the save under way is on disk and `latest` names it; None where there is none.

        Raises:
            TrainingError: on every rank, where the disk is full or a write failed; older checkpoints are untouched.
        """
        save, since = self._under_way, time.perf_counter()
        if save is None:
            return None
        self._under_way = None
        try:
            with _all_or_none(save.failure, clean_up=save.partial):
                save.thread.wait_written()
            with _all_or_none(save.failure, clean_up=save.partial):
                save.thread.wait_published()
        finally:
            save.thread.give_up()
        now = time.perf_counter()
        return SavedCheckpoint(save.state, save.final, save.stall_seconds + now - since, now - save.since)

    def settle(self) -> None:
        """Training ends in an error, perhaps on this rank alone: let the save under way become complete if it can."""
        save, self._under_way = self._under_way, None
        if save is not None:
            save.thread.wait_or_give_up(GRACE_SECONDS)

    def load(self, path: Path) -> TrainState:
        """Restore engine and random generators from a complete checkpoint of any number of ranks.

        The generators are restored where the number of ranks is the same; else each keeps its seed.

        Raises:
            CheckpointError: incomplete, damaged, or not of this model; names what differs.
        """
        with _all_or_none(f"{path} could not be loaded"):
            if not checkpoint_folder.is_complete(path):
                raise CheckpointError(f"{path} is no complete checkpoint")
            manifest = _read_json(path / "manifest.json")
            if manifest.get("format") != FORMAT:
                raise CheckpointError(f"{path}: format {manifest.get('format')}, this version reads {FORMAT}")
            check_manifest(manifest, self._trainable(), folder=path)
        frozen = self._frozen_checksums()
        with _all_or_none(f"{path} could not be loaded"):
            self._check_frozen(manifest["frozen"], frozen, path=path)
            read_fragments(path, self.engine.fragments(), saved_world_size=manifest["world_size"])
        self.engine.adopt_fragments(optimizer_step=manifest["optimizer_step"])
        with _all_or_none(f"{path} could not be loaded"):
            state = TrainState.from_dict(_read_json(path / "state.json")["train_state"])
            if manifest["world_size"] == self.engine.world_size:
                set_rng_state(_read_json(path / checkpoint_folder.generators_file(self.engine.rank)))
            elif self.engine.rank == 0:
                logger.info(
                    "%s was saved by %d ranks and is loaded by %d: random generators keep their seeds",
                    path, manifest["world_size"], self.engine.world_size,
                )  # fmt: skip
        return state

    def _trainable(self) -> dict[str, list[int]]:
        return {fragment.name: list(fragment.shape) for fragment in self.engine.fragments()}

    def _frozen_checksums(self) -> dict[str, tuple[float, float]]:
        if self._frozen is None:  # once: frozen parameters do not change
            self._frozen = self.engine.frozen_checksums()
        return self._frozen

    def _check_frozen(
        self, saved: dict[str, list[float]], found: dict[str, tuple[float, float]], *, path: Path
    ) -> None:
        other_names = sorted(saved.keys() ^ found.keys())
        if other_names:
            raise CheckpointError(
                f"{path} was saved with other frozen parameters, e.g. {', '.join(other_names[:3])}; "
                "use the recipe it was trained with"
            )
        differ = [
            name
            for name, (total, absolute) in found.items()
            if abs(total - saved[name][0]) + abs(absolute - saved[name][1]) > FROZEN_TOLERANCE * (1 + saved[name][1])
        ]
        if differ:
            parts = sorted({self.part_of(name) for name in differ})
            raise CheckpointError(
                f"{path}: the frozen weights of {', '.join(parts)} are not those it was trained with "
                f"({len(differ)} parameters differ, e.g. {differ[0]}); point `model:` at the same source"
            )

    def _check_disk(self) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        numel = sum(math.prod(shape) for shape in self._trainable().values())
        needed, free = int(numel * BYTES_PER_ELEMENT * 1.02) + 2**20, shutil.disk_usage(self.output_dir).free
        if free < needed:
            raise TrainingError(
                f"{self.output_dir}: a checkpoint needs {needed / 2**30:.3f} GiB and {free / 2**30:.3f} GiB are free; "
                "make room, or lower train.save_total_limit"
            )

    def _buffers(self) -> HostCopy:
        if self._host_copy is None:
            self._host_copy = HostCopy(self.engine.fragments(), pin=self.engine.device.type == "cuda")
        return self._host_copy

    def _manifest(self, frozen: dict[str, tuple[float, float]]) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "world_size": self.engine.world_size,
            "precision": self.engine.options.precision,
            "optimizer_step": self.engine.optimizer_step(),
            "layout": "rank r holds elements [r * ceil(n / W), min(n, (r + 1) * ceil(n / W))) of the flat parameter",
            "dtype": "float32",
            "trainable": self._trainable(),
            "frozen": frozen,
        }

    def _write_descriptions(self, partial: Path, state: TrainState, manifest: dict[str, Any]) -> None:
        schedule = {
            key: getattr(self.engine.options, key)
            for key in ("learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "max_steps")
        }
        described = {
            "train_state": state.to_dict(),
            "schedule": schedule,
            "versions": versions(),
            "commit": git_commit(),
        }
        atomic_write_json(partial / "manifest.json", manifest)
        atomic_write_json(partial / "state.json", described)
        atomic_write(partial / "recipe.yaml", self.recipe_yaml)

    def _publish(self, partial: Path, final: Path) -> None:
        atomic_write(partial / checkpoint_folder.COMPLETE, "")
        if final.exists():  # the same step, saved before a restart: its name moves to the new one
            replaced = final.with_name(f".{final.name}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(final, replaced)
        os.replace(partial, final)
        fsync_directory(self.output_dir)
        atomic_write(self.output_dir / checkpoint_folder.POINTER, final.name + "\n")


@contextmanager
def _all_or_none(what: str, *, clean_up: Path | None = None) -> Iterator[None]:
    """An error on one rank becomes the same error on every rank, instead of a hang of the others.

    Errors of the system (a full disk) become a TrainingError that begins with `what`.
    """
    error: SamtrainError | None = None
    try:
        yield
    except SamtrainError as raised:
        error = raised
    except Exception as raised:
        error = TrainingError(f"{what}: {raised}")
        logger.debug("rank %d: %s", distributed.rank(), what, exc_info=True)
    first = next((found for found in distributed.all_gather_on_hosts(error) if found is not None), None)
    if first is not None:
        if clean_up is not None and distributed.is_main_process():
            shutil.rmtree(clean_up, ignore_errors=True)
        raise first


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); resume from another checkpoint") from None
