"""Build MmLINK: sources to shards, stage by stage; whole or not at all, and never twice what is done.

    read -> segment (things), plates (backgrounds) -> plan -> caption, compose, describe -> fill -> write -> filters

    output/train, validation, test     shards and their index
    output/build_report.json           counts and times of every stage, what was left out and why
    output/rejected.jsonl              planned samples that were not kept, with reasons
    output/attribution.json, ATTRIBUTION.md, pictures.jsonl
    output/contact_sheet.png           samples to look at; stages.png shows how some came about

Everything random comes from the seed and the names of things, so the bytes do not depend on workers, machines or
interruptions (where a model does not: a language model's responses are kept, see `language.chat`).
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from samtrain.core.errors import DataError
from samtrain.core.files import atomic_write_json
from samtrain.core.log import logger
from samtrain.data.mmlink import output
from samtrain.data.mmlink.fill import NEEDS_PLATES
from samtrain.data.mmlink.filters import Finished, NearDuplicates, reason_against
from samtrain.data.mmlink.jobs import VERSIONS, JobMaker
from samtrain.data.mmlink.options import COVERS, OBJECTS, BuildConfig
from samtrain.data.mmlink.plan import Catalog, Plan, Usable, make_plans, wanted_counts
from samtrain.data.mmlink.preflight import check_stages
from samtrain.data.mmlink.records import BACKGROUND, COVER, ICON, OBJECT, SourcePicture
from samtrain.data.mmlink.runner import Backend, LocalBackend, StageRunner
from samtrain.data.mmlink.sheet import contact_sheet, stages_sheet
from samtrain.data.mmlink.sources import collect
from samtrain.data.mmlink.sources.listing import Listing, Progress
from samtrain.data.mmlink.store import Ref, Store, remove_leftovers

REPORT_FILE = "build_report.json"
FORMAT_VERSION = 1
_NO_PART_OF_A_SET = ("output", "work", "execution", "max_failed_fraction")


def build_mmlink(config: BuildConfig, *, cache: Path | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Build the set, or find it, complete and built with the same configuration.

    Args:
        cache: of fetched and rendered art; default: the environment variable SAMTRAIN_CACHE, else ~/.cache/samtrain.
        progress: called as progress(stage, done, total).

    Returns:
        The report, with `reused` telling whether the set was there already.

    Raises:
        InputError: the configuration, a source or a model cannot be used; the output holds something else.
        SamtrainError: a stage could not be finished; what is done is kept.
    """
    show = progress or (lambda what, done, total: None)
    folder = Path(config.build.output).absolute()
    found = _existing(folder, config)
    if found is not None:
        return found | {"reused": True}
    check_stages(config)
    work = Path(config.build.work or f"{folder}.work").absolute()
    work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with _only_build(work), contextlib.ExitStack() as stack:
        remove_leftovers(work)
        listings = collect(config.sources, cache=(cache or _default_cache()) / "mini", progress=show)
        backend = _backend(config, stack)
        runner = StageRunner(config, work=work, backend=backend, progress=show)
        build = _Build(config, runner)
        samples = build.samples(listings)
        kept, rejected = build.filtered(samples)
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.building-", dir=folder.parent))
        try:
            building.chmod(0o755)
            splits = output.write_splits(building, kept, runner.store, build.rows, progress=show)
            pictures = {thing.picture for sample in kept for canvas in sample.plan.canvases for thing in canvas}
            pictures |= {row["plate"] for key in build.backgrounds for row in build.backgrounds[key] if row["plate"]}
            output.write_attribution(building, listings, pictures)
            output.write_rejected(building, rejected)
            report = {
                "name": config.build.name,
                "configuration": _set_values(config),
                "execution": config.build.execution.model_dump(mode="json") | _where(backend),
                "splits": splits,
                "sources": [listing.facts() for listing in listings],
                **build.facts(),
                "filters": _filter_facts(config, kept, rejected),
                "stages": {name: stage.to_dict() for name, stage in runner.reports.items()},
                "seconds": round(time.monotonic() - started, 1),
                "versions": _versions(),
            }
            contact_sheet(building, building / "contact_sheet.png", seed=config.build.seed)
            stages_sheet(kept, runner.store, building / "stages.png")
            atomic_write_json(building / REPORT_FILE, report)
            os.rename(building, folder)  # also onto an empty folder
        finally:
            shutil.rmtree(building, ignore_errors=True)
            runner.store.close()
    return report | {"reused": False}


class _Build:
    """What is known of the samples, growing stage by stage."""

    def __init__(self, config: BuildConfig, runner: StageRunner) -> None:
        self.config, self.runner, self.jobs = config, runner, JobMaker(config)
        self.store: Store = runner.store
        self.catalog: Catalog | None = None
        self.agreements: list[float] = []
        self.refused: Counter[str] = Counter()  # source pictures that were read and are of no use
        self.rows: dict[str, dict[str, Any]] = {}  # key of a sample -> what its record needs
        self.backgrounds: dict[str, list[dict[str, Any]]] = {}  # key -> per picture: description, plate, shows
        self.dropped: list[tuple[Plan, str]] = []

    def samples(self, listings: Sequence[Listing]) -> list[Finished]:
        """All stages; samples that a stage rejected are in `dropped`."""
        options = self.config.build
        pictures = [picture for listing in listings for picture in listing.pictures if self._is_used(picture)]
        read = self._read(pictures)
        self.catalog = Catalog(self._usable(pictures, read), options)
        plans = make_plans(self.catalog, options)
        captions = self._captions(plans, {picture.id: picture for picture in pictures}, read)
        composed = self._composed(plans)
        plans = [plan for plan in plans if plan.domain == COVERS or plan.key in composed]
        descriptions = self._descriptions(plans)
        filled = self._filled(plans, composed, descriptions)
        plans = [plan for plan in plans if plan.key in filled]
        return self._written(plans, composed, filled, captions)

    def filtered(self, samples: Sequence[Finished]) -> tuple[list[Finished], list[tuple[Plan, str]]]:
        """What is kept, as many as are wanted, and what is not, with reasons."""
        options = self.config.build
        wanted = wanted_counts(options)
        bits = options.filters.near_duplicate_bits
        duplicates = NearDuplicates(bits) if bits is not None else None
        kept: list[Finished] = []
        rejected = list(self.dropped)
        counts: Counter[tuple[str, str]] = Counter()
        for sample in samples:
            cell = sample.plan.split, sample.plan.domain
            reason = reason_against(sample, options.filters)
            if reason is None and duplicates is not None and duplicates.find(sample.hashes):
                reason = "near-duplicate of another sample"
            if reason is None and counts[cell] >= wanted[cell]:
                reason = "more than were wanted"
            if reason is not None:
                rejected.append((sample.plan, reason))
                continue
            if duplicates is not None:
                duplicates.add(sample.plan.key, sample.hashes)
            counts[cell] += 1
            kept.append(sample)
        short = {f"{split}/{domain}": n - counts[split, domain] for (split, domain), n in wanted.items()}
        missing = {cell: count for cell, count in short.items() if count > 0}
        if missing:
            logger.warning("fewer samples than wanted (missing: %s): raise oversample, or add sources", missing)
        if not kept:
            raise DataError(f"no sample was kept; reasons: {dict(Counter(reason for _, reason in rejected))}")
        # Domains mixed, in an order that no worker decides.
        kept.sort(key=lambda sample: (sample.plan.split, sample.plan.seed))
        return kept, rejected

    def facts(self) -> dict[str, Any]:
        """For the report: identities, how well things were segmented."""
        assert self.catalog is not None
        found = sorted(self.agreements)
        agreement = {
            "pictures_with_own_alpha": len(found),
            "mean_iou": round(sum(found) / len(found), 4),
            "median_iou": round(found[len(found) // 2], 4),
        }
        return {
            "identities": self.catalog.facts(),
            "segmentation": {
                **(agreement if found else {}),
                "not_used": dict(self.refused),
                "poses_too_alike": self.catalog.same_poses,
            },
        }

    def _is_used(self, picture: SourcePicture) -> bool:
        """Whether its domain is built at all."""
        shares = self.config.build.domains
        objects = shares.objects > 0
        return {
            OBJECT: objects,
            BACKGROUND: objects and self.config.fill.kind in NEEDS_PLATES,
            ICON: shares.icons > 0,
            COVER: shares.covers > 0,
        }[picture.role]

    def _read(self, pictures: Sequence[SourcePicture]) -> dict[str, tuple[str, Ref]]:
        """Picture id -> key and ref."""
        jobs = {picture.id: self.jobs.read(picture) for picture in pictures}
        refs = self.runner.run("read", list(jobs.values()))
        return self._accepted({name: job.key for name, job in jobs.items()}, refs)

    def _usable(self, pictures: Sequence[SourcePicture], read: dict[str, tuple[str, Ref]]) -> list[Usable]:
        """Cut-outs of things and icons, plates of backgrounds, covers as they are."""
        of_role = {
            role: [picture for picture in pictures if picture.role == role and picture.id in read]
            for role in (OBJECT, ICON, COVER, BACKGROUND)
        }
        things = of_role[OBJECT] + of_role[ICON]
        cut = {picture.id: self.jobs.segment(*read[picture.id]) for picture in things}
        cut_refs = self.runner.run("segment", list(cut.values())) if cut else {}
        usable = []
        for picture in things:
            key = cut[picture.id].key
            facts = self.store.meta(cut_refs[key]) if key in cut_refs else {"rejected": "failed"}
            reason = self._against_cutout(facts)
            if reason is None:
                usable.append(Usable(picture, key, cut_refs[key], facts["shape"]))
            else:
                self.refused[reason] += 1
        usable += [Usable(picture, *read[picture.id]) for picture in of_role[COVER]]
        plates = {picture.id: self.jobs.plates(*read[picture.id]) for picture in of_role[BACKGROUND]}
        plate_refs = self.runner.run("plates", list(plates.values())) if plates else {}
        made = self._accepted({name: job.key for name, job in plates.items()}, plate_refs)
        usable += [Usable(picture, *made[picture.id]) for picture in of_role[BACKGROUND] if picture.id in made]
        if self.config.fill.kind in NEEDS_PLATES and self.config.build.domains.objects > 0 and not made:
            raise DataError(
                f"fill.kind = {self.config.fill.kind!r} puts things on photographs, and no source has one; add "
                "`kind: photographs` or a folder with `role: background`, or choose fill.kind = generated"
            )
        return usable

    def _against_cutout(self, facts: dict[str, Any]) -> str | None:
        limits: Any = self.config.segment.options
        if "rejected" in facts:
            return str(facts["rejected"])
        if facts["agreement"] is not None:
            self.agreements.append(facts["agreement"])
            if facts["agreement"] < limits.min_agreement:
                return "segmented otherwise than its own alpha says (segment.min_agreement)"
        if not limits.min_area <= facts["area"] <= limits.max_area:
            return "covers too little or too much of its picture (segment.min_area, max_area)"
        return None

    def _captions(
        self, plans: Sequence[Plan], pictures: dict[str, SourcePicture], read: dict[str, tuple[str, Ref]]
    ) -> dict[str, str]:
        """Picture id -> caption, of those that serve as A."""
        ids = sorted({p.target_on(i).picture for p in plans if p.domain == OBJECTS for i in range(len(p.canvases))})
        jobs = {
            name: self.jobs.caption(*read[name], name=pictures[name].name, caption=pictures[name].caption)
            for name in ids
        }
        refs = self.runner.run("caption", list(jobs.values())) if jobs else {}
        return {name: self.store.meta(refs[job.key])["caption"] for name, job in jobs.items() if job.key in refs}

    def _composed(self, plans: Sequence[Plan]) -> dict[str, tuple[str, Ref]]:
        """Sample -> key and ref of its mask images."""
        jobs = {plan.key: self.jobs.compose(plan) for plan in plans if plan.domain != COVERS}
        refs = self.runner.run("compose", list(jobs.values())) if jobs else {}
        accepted: dict[str, tuple[str, Ref]] = {}
        for plan in plans:
            if plan.key in jobs:
                self._take(plan, jobs[plan.key].key, refs, accepted)
        return accepted

    def _descriptions(self, plans: Sequence[Plan]) -> dict[str, list[str]]:
        """Sample -> a description per canvas."""
        shown = [plan for plan in plans if plan.domain == OBJECTS]
        jobs = {plan.key: self.jobs.describe(plan, self._plates(plan)) for plan in shown}
        refs = self.runner.run("describe", list(jobs.values())) if jobs else {}
        return {name: self.store.meta(refs[job.key])["descriptions"] for name, job in jobs.items() if job.key in refs}

    def _filled(
        self, plans: Sequence[Plan], composed: dict[str, tuple[str, Ref]], descriptions: dict[str, list[str]]
    ) -> dict[str, tuple[str, Ref]]:
        """Sample -> key and ref of its pictures."""
        jobs = {}
        for plan in plans:
            if plan.domain == OBJECTS and plan.key not in descriptions:
                self.dropped.append((plan, "no description of its backgrounds"))
                continue
            said = descriptions.get(plan.key, [])
            job = self.jobs.fill(plan, composed.get(plan.key, ("", "")), said, self._plates(plan))
            jobs[plan.key] = job
            self.backgrounds[plan.key] = self._background_rows(plan, said)
        refs = self.runner.run("fill", list(jobs.values()))
        accepted: dict[str, tuple[str, Ref]] = {}
        for plan in plans:
            if plan.key in jobs:
                self._take(plan, jobs[plan.key].key, refs, accepted)
        return accepted

    def _background_rows(self, plan: Plan, descriptions: Sequence[str]) -> list[dict[str, Any]]:
        if plan.domain != OBJECTS:
            return [{"background": "", "plate": ""} for _ in plan.canvases]
        rows = []
        for number, description in enumerate(descriptions):
            plate = self.jobs.plate_of(plan, number, description, self._plates(plan))
            rows.append(
                {"background": plate.picture.name if plate else description, "plate": plate.picture.id if plate else ""}
            )
        return rows

    def _written(
        self,
        plans: Sequence[Plan],
        composed: dict[str, tuple[str, Ref]],
        filled: dict[str, tuple[str, Ref]],
        captions: dict[str, str],
    ) -> list[Finished]:
        jobs = {}
        for plan in plans:
            objects = self.store.meta(composed[plan.key][1])["canvases"] if plan.key in composed else []
            jobs[plan.key] = self.jobs.write(output.facts_of(plan, objects, captions, self.config.build.compose.canvas))
            self.rows[plan.key] = {
                "objects": objects,
                "backgrounds": self.backgrounds[plan.key],
            }
        refs = self.runner.run("write", list(jobs.values()))
        samples = []
        for plan in plans:
            accepted: dict[str, tuple[str, Ref]] = {}
            self._take(plan, jobs[plan.key].key, refs, accepted)
            if plan.key in accepted:
                text = self.store.meta(accepted[plan.key][1])
                seen = self.store.meta(filled[plan.key][1])
                samples.append(
                    Finished(
                        plan=plan,
                        instruction=text["instruction"],
                        answer=text["answer"],
                        contrasts=tuple(seen["contrasts"]),
                        hashes=tuple(seen["hashes"]),
                        compose_ref=composed[plan.key][1] if plan.key in composed else "",
                        fill_ref=filled[plan.key][1],
                    )
                )
        return samples

    def _plates(self, plan: Plan) -> list[Usable]:
        assert self.catalog is not None
        return self.catalog.backgrounds(plan.split) if self.jobs.needs_plate(plan) else []

    def _take(self, plan: Plan, key: str, refs: dict[str, Ref], accepted: dict[str, tuple[str, Ref]]) -> None:
        """File the result of a sample's stage, or the reason why it has none."""
        if key not in refs:
            self.dropped.append((plan, "a stage failed (see the report)"))
            return
        reason = self.store.meta(refs[key]).get("rejected")
        if reason:
            self.dropped.append((plan, reason))
        else:
            accepted[plan.key] = key, refs[key]

    def _accepted(self, keys: dict[str, str], refs: dict[str, Ref]) -> dict[str, tuple[str, Ref]]:
        """Name -> key and ref of results that are no rejections; the others are counted."""
        accepted = {}
        for name, key in keys.items():
            reason = self.store.meta(refs[key]).get("rejected") if key in refs else "failed (see the stages)"
            if reason:
                self.refused[reason] += 1
            else:
                accepted[name] = key, refs[key]
        return accepted


def _backend(config: BuildConfig, stack: contextlib.ExitStack) -> Backend:
    if config.build.execution.backend == "local":
        return LocalBackend()
    from samtrain.data.mmlink.ray_data import RaySession

    return stack.enter_context(RaySession(config.build.execution))


def _where(backend: Backend) -> dict[str, Any]:
    if isinstance(backend, LocalBackend):
        return {"nodes": 1, "cluster_cpus": 1, "cluster_gpus": 0}
    return {name: getattr(backend, key) for name, key in
            (("nodes", "num_nodes"), ("cluster_cpus", "num_cpus"), ("cluster_gpus", "num_gpus"))}  # fmt: skip


@contextlib.contextmanager
def _only_build(work: Path) -> Iterator[None]:
    """Raises DataError where another build is using the work folder; a killed one leaves no lock behind."""
    with open(work / "lock", "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{work}: another build is using this work folder; wait for it, or set `work`") from None
        yield


def _set_values(config: BuildConfig) -> dict[str, Any]:
    """What decides the content of a set."""
    values = {name: value for name, value in config.dump().items() if name not in _NO_PART_OF_A_SET}
    return {"format_version": FORMAT_VERSION, "stage_versions": VERSIONS, **values}


def _existing(folder: Path, config: BuildConfig) -> dict[str, Any] | None:
    """The report of the complete set in `folder`; None where nothing is there."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        report: dict[str, Any] = json.loads((folder / REPORT_FILE).read_bytes())
        built = report["configuration"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{folder}: is not empty and holds no complete set (no readable {REPORT_FILE}); choose another output, or "
            "delete this folder"
        ) from None
    wanted = json.loads(json.dumps(_set_values(config)))
    different = [name for name in sorted({*built, *wanted}) if built.get(name) != wanted.get(name)]
    if different:
        raise DataError(
            f"{folder}: holds a set built with another configuration (different: {', '.join(different)}); choose "
            "another output, or delete this folder (the work folder keeps what need not be made again)"
        )
    return report


def _filter_facts(config: BuildConfig, kept: list[Finished], rejected: list[tuple[Plan, str]]) -> dict[str, Any]:
    counts = Counter((sample.plan.split, sample.plan.domain) for sample in kept)
    return {
        "planned": len(kept) + len(rejected),
        "kept": len(kept),
        "not_kept": dict(Counter(reason for _, reason in rejected).most_common()),
        "wanted": {f"{split}/{domain}": count for (split, domain), count in wanted_counts(config.build).items()},
        "got": {f"{split}/{domain}": count for (split, domain), count in sorted(counts.items())},
    }


def _default_cache() -> Path:
    chosen = os.environ.get("SAMTRAIN_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "samtrain"


def _versions() -> dict[str, str]:
    found = {}
    for name in (
        "numpy",
        "pillow",
        "opencv-python-headless",
        "onnxruntime",
        "ImageHash",
        "transformers",
        "diffusers",
        "ray",
    ):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
