"""Run a stage: find what is done, do the rest, count everything."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from samtrain.core.errors import ConfigError, DataError, SamtrainError
from samtrain.core.log import logger
from samtrain.data.mmlink.language.chat import BudgetExhausted, RequestRefused
from samtrain.data.mmlink.options import BuildConfig, StageResources
from samtrain.data.mmlink.records import Job
from samtrain.data.mmlink.sources.listing import Progress
from samtrain.data.mmlink.stages import DONE, FAILED, FATAL, REJECTED, Row, StageWorker
from samtrain.data.mmlink.store import Ref, Store

# Items that a worker does before it writes them down: what kill -9 can cost, against the number of files.
BATCH_SIZES = {
    "read": 64,
    "segment": 8,
    "plates": 1,
    "caption": 8,
    "compose": 64,
    "describe": 256,
    "fill": 32,
    "write": 256,
}
_LISTED_REASONS = 20
_ERRORS: dict[str, type[SamtrainError]] = {
    error.__name__: error for error in (ConfigError, DataError, BudgetExhausted, RequestRefused, SamtrainError)
}


class Backend(Protocol):
    """Where batches run."""

    def run(
        self,
        jobs: Sequence[Job],
        *,
        stage: str,
        config: dict[str, Any],
        work: Path,
        resources: StageResources,
        batch_size: int,
    ) -> Iterator[list[Row]]: ...


class LocalBackend:
    """In this process, one batch after the other."""

    def run(
        self,
        jobs: Sequence[Job],
        *,
        stage: str,
        config: dict[str, Any],
        work: Path,
        resources: StageResources,
        batch_size: int,
    ) -> Iterator[list[Row]]:
        worker = StageWorker(stage=stage, config=config, work=str(work))
        for start in range(0, len(jobs), batch_size):
            yield worker.run(list(jobs[start : start + batch_size]))


@dataclass
class StageReport:
    """Counts and times of a stage. seconds: by the clock, of this build; work_seconds: what its results took, those of
    earlier builds included, all workers together; cpu_seconds of them on a core (a model's own threads and a GPU do not
    count)."""

    jobs: int = 0
    found: int = 0  # done before, by this build or by an earlier one
    done: int = 0
    rejected: int = 0
    failed: int = 0
    seconds: float = 0.0
    work_seconds: float = 0.0
    cpu_seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    usage: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        worked = self.found + self.done + self.rejected + self.failed
        return {
            "jobs": self.jobs,
            "found": self.found,
            "done": self.done,
            "rejected": self.rejected,
            "failed": self.failed,
            "seconds": round(self.seconds, 2),
            "work_seconds": round(self.work_seconds, 2),
            "cpu_seconds": round(self.cpu_seconds, 2),
            "work_seconds_per_item": round(self.work_seconds / worked, 5) if worked else None,
            "cpu_seconds_per_item": round(self.cpu_seconds / worked, 5) if worked else None,
            "reasons": dict(self.reasons.most_common(_LISTED_REASONS)),
            **({"usage": self.usage} if self.usage else {}),
        }


class StageRunner:
    """Runs stages one after the other; `reports` has a row for each."""

    def __init__(self, config: BuildConfig, *, work: Path, backend: Backend, progress: Progress) -> None:
        self.config, self.work, self.backend, self.progress = config, work, backend, progress
        self.store = Store(work)
        self.reports: dict[str, StageReport] = {}

    def run(self, stage: str, jobs: Sequence[Job]) -> dict[str, Ref]:
        """Key -> ref of the result of every job that has one, rejections included.

        Raises:
            SamtrainError: the budget is used up, a model is not there, or too many items failed; what is done is kept.
        """
        report = self.reports[stage] = StageReport()
        unique = list({job.key: job for job in jobs}.values())
        report.jobs = len(unique)
        started = time.monotonic()
        kept = self.store.scan(stage)
        results = {job.key: kept[job.key] for job in unique if job.key in kept}
        report.found = len(results)
        report.work_seconds, report.cpu_seconds = self.store.took(results.values())
        missing = [job for job in unique if job.key not in kept]
        if missing:
            self.progress(stage, len(results), len(unique))
            for rows in self._batches(stage, missing):
                self._count(report, rows, results)
                self.progress(stage, report.found + report.done + report.rejected + report.failed, len(unique))
        report.seconds = time.monotonic() - started
        self._check_failures(stage, report)
        return results

    def _batches(self, stage: str, jobs: list[Job]) -> Iterator[list[Row]]:
        resources: StageResources = getattr(self.config.build.execution.stages, stage)
        backend = LocalBackend() if self._stays_here(stage) else self.backend
        return backend.run(
            jobs,
            stage=stage,
            config=self.config.dump(),
            work=self.work,
            resources=resources,
            batch_size=resources.batch_size or BATCH_SIZES[stage],
        )

    def _stays_here(self, stage: str) -> bool:
        """Labels and templates take less time than a worker's start; and the calls of a language model share limits, a
        budget and a key that are this process's."""
        return stage in ("describe", "write") or (stage == "caption" and self.config.captions.kind == "labels")

    def _count(self, report: StageReport, rows: list[Row], results: dict[str, Ref]) -> None:
        for row in rows:
            report.work_seconds += row["seconds"]
            report.cpu_seconds += row["cpu_seconds"]
            if row["status"] == FATAL:
                raise _error(row)
            if row["status"] == FAILED:
                report.failed += 1
                report.reasons[f"failed: {row['reason']}"] += 1
                continue
            results[row["key"]] = row["ref"]
            if row["status"] == REJECTED:
                report.rejected += 1
            else:
                assert row["status"] == DONE
                report.done += 1
            report.usage = row["usage"] or report.usage

    def _check_failures(self, stage: str, report: StageReport) -> None:
        if not report.failed:
            return
        reason, count = report.reasons.most_common(1)[0]
        said = f"stage {stage}: {report.failed} of {report.jobs} items failed; {count} of them: {reason}"
        if report.failed > self.config.build.max_failed_fraction * report.jobs:
            raise SamtrainError(
                f"{said}; what is done is kept: build again to try those once more, or raise max_failed_fraction to go "
                "on without them"
            )
        logger.warning(said)


def _error(row: Row) -> Exception:
    known = _ERRORS.get(row["error"])
    return known(row["reason"]) if known else RuntimeError(f"a worker stopped:\n{row['reason']}")
