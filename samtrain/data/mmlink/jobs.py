"""The jobs of each stage, and the keys of their results.

A key is a digest of what a result depends on: the version of the code that makes it, the options of its stage, and the
keys of what it is made from. So a changed option redoes what depends on it and nothing else, and a result is right
whichever build made it. Options that change how fast or how dearly something is made, not what, are left out.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from samtrain.core.seeds import derive_seed
from samtrain.data.mmlink.fill import NEEDS_PLATES
from samtrain.data.mmlink.language import nearest_scene
from samtrain.data.mmlink.options import COVERS, ICONS, OBJECTS, BuildConfig, Choice
from samtrain.data.mmlink.plan import Plan, Usable
from samtrain.data.mmlink.records import BACKGROUND, Job, SourcePicture, digest

# Raised when a stage makes something else from the same input.
VERSIONS = {"read": 1, "segment": 2, "plates": 3, "caption": 1, "compose": 1, "describe": 1, "fill": 1, "write": 1}
_OPERATIONAL = {
    "device", "api_key_env", "timeout_seconds", "concurrency", "max_attempts", "backoff_seconds", "max_backoff_seconds",
    "requests_per_minute", "tokens_per_minute", "budget_requests", "budget_tokens", "budget_cost",
    "price_per_million_input_tokens", "price_per_million_output_tokens",
}  # fmt: skip
_LIMITS = {"min_area", "max_area", "min_agreement"}  # applied to results, not in them
_SCENES_OFFERED = 12  # to a writer, of the photographs at hand


class JobMaker:
    """Makes the jobs of one configuration."""

    def __init__(self, config: BuildConfig) -> None:
        self.config = config
        self._segment = _what(config.segment, leave_out=set() if config.segment.kind == "sam" else _LIMITS)

    def read(self, picture: SourcePicture) -> Job:
        options = self.config.build.pictures.model_dump()
        team = picture.facts.get("team")
        payload = {"role": picture.role, "locator": picture.to_dict()["locator"], "team": team}
        where = picture.locator
        if where.kind == "zip":  # the stock's folder does not matter, its name holds a digest
            what: Any = [where.kind, where.member, where.signature]
        else:
            what = [where.kind, where.path, where.member, where.signature]
        side = options["max_background_side" if picture.role == BACKGROUND else "max_side"]
        return Job(self._key("read", what, side, options["max_pixels"], options["max_bytes"], team), payload)

    def segment(self, read_key: str, read_ref: str) -> Job:
        return Job(self._key("segment", self._segment, read_key), {"ref": read_ref})

    def plates(self, read_key: str, read_ref: str) -> Job:
        plates = self.config.build.plates
        segment = self._segment if plates.remove else None
        return Job(self._key("plates", plates.model_dump(), segment, read_key), {"ref": read_ref})

    def caption(self, read_key: str, read_ref: str, *, name: str, caption: str) -> Job:
        key = self._key("caption", _what(self.config.captions), read_key, name, caption)
        return Job(key, {"ref": read_ref, "name": name, "caption": caption})

    def compose(self, plan: Plan) -> Job:
        canvases = [[{"ref": thing.ref, "mirror": thing.mirror} for thing in canvas] for canvas in plan.canvases]
        made_from = [[[thing.key, thing.mirror] for thing in canvas] for canvas in plan.canvases]
        key = self._key("compose", self.config.build.compose.model_dump(), plan.domain, plan.grid, plan.seed, made_from)
        return Job(key, {"domain": plan.domain, "canvases": canvases, "grid": plan.grid, "seed": plan.seed})

    def describe(self, plan: Plan, backgrounds: Sequence[Usable]) -> Job:
        scenes = sorted({item.picture.name for item in backgrounds}) if self.config.fill.kind in NEEDS_PLATES else []
        canvases = []
        for number, canvas in enumerate(plan.canvases):
            seed = derive_seed("describe", plan.seed, number)
            order = np.random.default_rng(seed).permutation(len(scenes))[:_SCENES_OFFERED]
            things = [thing.name for thing in canvas]
            canvases.append({"things": things, "scenes": [scenes[int(i)] for i in order], "seed": seed})
        return Job(self._key("describe", _what(self.config.writer), canvases), {"canvases": canvases})

    def fill(
        self, plan: Plan, compose: tuple[str, str], descriptions: Sequence[str], backgrounds: Sequence[Usable]
    ) -> Job:
        """compose: key and ref of the mask images."""
        canvases: list[dict[str, Any]] = []
        made_from: list[Any] = []
        for number, canvas in enumerate(plan.canvases):
            if plan.domain == COVERS:
                canvases.append({"ref": canvas[0].ref})
                made_from.append(canvas[0].key)
                continue
            description = descriptions[number] if plan.domain == OBJECTS else ""
            plate = self.plate_of(plan, number, description, backgrounds)
            held_out = plan.split == "test"
            canvases.append({"description": description, "plate": plate.ref if plate else "", "held_out": held_out})
            made_from.append([description, plate.key if plate else "", held_out])
        fill = "plain" if plan.domain in (ICONS, COVERS) else _what(self.config.fill)
        key = self._key("fill", fill, plan.domain, compose[0], made_from, plan.seed)
        return Job(key, {"domain": plan.domain, "ref": compose[1], "canvases": canvases, "seed": plan.seed})

    def write(self, facts: dict[str, Any]) -> Job:
        return Job(self._key("write", _what(self.config.writer), facts), {"facts": facts})

    def needs_plate(self, plan: Plan) -> bool:
        return plan.domain == OBJECTS and self.config.fill.kind in NEEDS_PLATES

    def plate_of(self, plan: Plan, canvas: int, description: str, backgrounds: Sequence[Usable]) -> Usable | None:
        """The photograph that fits a description, of several that show the same one by the plan's seed; None where the
        background is made without one."""
        if not self.needs_plate(plan):
            return None
        scene = nearest_scene(description, sorted({item.picture.name for item in backgrounds}))
        fitting = [item for item in backgrounds if item.picture.name == scene]
        return fitting[derive_seed("plate", plan.seed, canvas) % len(fitting)]

    def _key(self, stage: str, *parts: Any) -> str:
        return digest(stage, VERSIONS[stage], *parts)


def _what(choice: Choice, *, leave_out: set[str] | None = None) -> dict[str, Any]:
    """The options that results depend on."""
    hidden = _OPERATIONAL | (leave_out or set())
    return {name: value for name, value in choice.dump().items() if name not in hidden}
