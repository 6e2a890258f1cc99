"""The configuration of a build: one YAML file, strict; every model stage is chosen by its `kind`.

Sections with a `kind` (each source, segment, plates, fill, captions, writer) are read by the options class of that
kind, so a key of another kind is an error that names the nearest right one.
"""

import difflib
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from samtrain.core.errors import ConfigError
from samtrain.core.options import Options, parse_options

OBJECTS, ICONS, COVERS = "objects", "icons", "covers"
DOMAINS = (OBJECTS, ICONS, COVERS)
STAGES = ("read", "segment", "plates", "caption", "compose", "describe", "fill", "write")

# ---------------------------------------------------------------- sources


class FolderOptions(Options):
    """Pictures of one's own: `path/IDENTITY/POSE.jpg`, or any layout with a `metadata.jsonl` in `path`.

    role: what the pictures are for. category: what the things are, unless metadata says it for a picture.
    """

    path: str
    role: Literal["object", "icon", "cover", "background"] = "object"
    category: str = "object"
    title: str = ""  # for the attribution, with author and licence
    author: str = ""
    licence: str = ""


class EmojiOptions(Options):
    """Open emoji sets as npm packages (fetched once): a thing in several drawing styles, and icons."""

    max_identities: int | None = Field(default=None, ge=1)
    objects: bool = True
    icons: bool = True


class SpritesOptions(Options):
    """Characters of the game "Battle for Wesnoth" in several poses. path: its folder; null = the usual places.

    max_poses: of one character, spread over its animations: frames beside each other differ little.
    """

    path: str | None = None
    required: bool = False
    max_identities: int | None = Field(default=None, ge=1)
    max_poses: int | None = Field(default=None, ge=2)


class StampsOptions(Options):
    """Labelled cut-outs of Tux Paint, many of them photographs. path: the folder `stamps`; null = the usual place."""

    path: str | None = None
    required: bool = False


class PhotographsOptions(Options):
    """Backgrounds. paths: folders to look through; null = where Debian puts wallpapers and Tux Paint's photographs."""

    paths: list[str] | None = None
    required: bool = False


class DrawnCoversOptions(Options):
    """Covers of works in the public domain, typeset here: real titles, authors and genres, no art of anybody's."""

    editions: int = Field(default=4, ge=1, le=50)  # designs of each work


SOURCES: dict[str, type[Options]] = {
    "folder": FolderOptions,
    "emoji": EmojiOptions,
    "sprites": SpritesOptions,
    "stamps": StampsOptions,
    "photographs": PhotographsOptions,
    "drawn-covers": DrawnCoversOptions,
}

# ---------------------------------------------------------------- stages


class PictureOptions(Options):
    """How sources are read. Larger files and pictures are refused and listed."""

    max_side: int = Field(default=512, ge=16)  # kept pictures are scaled down to this, in pixels
    max_background_side: int = Field(default=1024, ge=16)
    max_pixels: int = Field(default=64_000_000, ge=1)
    max_bytes: int = Field(default=64_000_000, ge=1)


class _SegmentOptions(Options):
    """min_area, max_area: of the thing, as a part of its picture. min_agreement: with a picture's own alpha (IoU)."""

    min_area: float = Field(default=0.02, ge=0, le=1)
    max_area: float = Field(default=0.97, ge=0, le=1)
    min_agreement: float = Field(default=0.8, ge=0, le=1)
    own_alpha: bool = False  # take a picture's own alpha where it has one; false: segment it as any picture


class AlphaOptions(_SegmentOptions):
    """The alpha of cut-out art; pictures without one are segmented by GrabCut."""

    own_alpha: bool = True


class GrabCutOptions(_SegmentOptions):
    """OpenCV's GrabCut from a centred box. margin: of that box, as a part of the side."""

    margin: float = Field(default=0.04, gt=0, lt=0.5)
    iterations: int = Field(default=5, ge=1, le=50)


class U2netOptions(_SegmentOptions):
    """Salient things by U-2-Net as ONNX. model: a path, or "packaged:u2netp"."""

    model: str = "packaged:u2netp"
    refine: bool = True  # the outline snapped to edges by GrabCut


class SamOptions(_SegmentOptions):
    """A Segment-Anything model of transformers (sam, sam_hq, sam2, ...): hub name or local folder."""

    model: str = "facebook/sam-vit-base"
    revision: str | None = None
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


SEGMENTERS: dict[str, type[Options]] = {
    "alpha": AlphaOptions,
    "grabcut": GrabCutOptions,
    "u2net": U2netOptions,
    "sam": SamOptions,
}


class PlatesOptions(Options):
    """Backgrounds without their own things: what stands out is segmented and inpainted, once per photograph.

    remove: false keeps photographs as they are. max_removed: pictures of which more would go keep what they show.
    """

    remove: bool = True
    inpaint: Literal["telea", "patchmatch"] = "telea"
    max_removed: float = Field(default=0.2, ge=0, le=1)
    grow: int = Field(default=7, ge=0)  # pixels around what is removed that go too: shadows, edges


class ComposeOptions(Options):
    """Mask images. Scales are longest sides as parts of the canvas; overlap is of boxes, as a part of the smaller."""

    canvas: int = Field(default=224, ge=32, le=4096)
    num_images: tuple[int, int] = (2, 2)  # fewest and most canvases (poses of A) per sample
    num_distractors: tuple[int, int] = (1, 1)  # things beside A on each canvas
    scale: tuple[float, float] = (0.38, 0.62)
    distractor_scale: tuple[float, float] = (0.3, 0.55)
    max_enlargement: float = Field(default=1.5, ge=1)
    max_overlap: float = Field(default=0.1, ge=0, le=1)
    min_visible: float = Field(default=0.85, gt=0, le=1)
    max_rotation: float = Field(default=8.0, ge=0, le=180)  # degrees, either way
    mirror: bool = True
    attempts: int = Field(default=60, ge=1)
    grid: tuple[int, int] = (3, 4)  # fewest and most icons along a side

    @model_validator(mode="before")
    @classmethod
    def _lists_are_pairs(cls, values: Any) -> Any:
        return (
            {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            if isinstance(values, dict)
            else values
        )

    @model_validator(mode="after")
    def _ranges(self) -> "ComposeOptions":
        limits: dict[str, tuple[float, float]] = {"num_images": (2, 8), "num_distractors": (1, 5), "grid": (2, 8)}
        limits |= {"scale": (0.05, 1), "distractor_scale": (0.05, 1)}
        for name, (least, most) in limits.items():
            low, high = getattr(self, name)
            if not least <= low <= high <= most:
                raise ValueError(f"{name} = [{low}, {high}]: expected {least} <= fewest <= most <= {most}")
        return self


class GeneratedFillOptions(Options):
    """Backgrounds made from numbers: flat, graded, patterned, simple landscapes. Need no source."""


class PhotographFillOptions(Options):
    """Things pasted on a part of a photograph (a plate) that fits the description.

    min_contrast: mean colour distance between a thing's edge and what is around it, of 255.
    """

    min_contrast: float = Field(default=18.0, ge=0)
    crops: int = Field(default=8, ge=1)  # parts tried before the one of most contrast is taken
    min_crop: float = Field(default=0.35, gt=0, le=1)  # of the plate's shorter side


class InpaintFillOptions(PhotographFillOptions):
    """As photographs, with a band around the things left open and inpainted, so that no paste edge remains."""

    band: int = Field(default=3, ge=1, le=64)  # pixels


class DiffusersFillOptions(Options):
    """An inpainting pipeline of diffusers: hub name or local folder. The things stay as they are, pixel for pixel."""

    model: str
    revision: str | None = None
    size: int = Field(default=512, ge=8, multiple_of=8)
    steps: int = Field(default=30, ge=1)
    guidance_scale: float = Field(default=7.5, ge=0)
    negative_prompt: str = "text, watermark, people, animals, extra objects, low quality"
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


FILLERS: dict[str, type[Options]] = {
    "generated": GeneratedFillOptions,
    "photographs": PhotographFillOptions,
    "telea": InpaintFillOptions,
    "patchmatch": InpaintFillOptions,
    "diffusers": DiffusersFillOptions,
}


class LabelCaptionOptions(Options):
    """What the source itself says of its pictures."""


class InstructBlipOptions(Options):
    """InstructBLIP of transformers: hub name or local folder."""

    model: str = "Salesforce/instructblip-vicuna-7b"
    revision: str | None = None
    prompt: str = "A short image description."
    max_new_tokens: int = Field(default=40, ge=1)
    num_beams: int = Field(default=5, ge=1)
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


CAPTIONERS: dict[str, type[Options]] = {"labels": LabelCaptionOptions, "instructblip": InstructBlipOptions}


class TemplateWriterOptions(Options):
    """Paraphrase templates over known facts; needs no model and states nothing that is not so."""


class ChatWriterOptions(Options):
    """A language model behind an OpenAI-compatible endpoint (`POST base_url/chat/completions`).

    api_key_env: the environment variable that holds the key; the key itself never stands in a file. Limits are of the
    whole build, restarts included; null = none. concurrency: requests under way at once.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float = Field(default=0.7, ge=0, le=2)
    max_tokens: int = Field(default=200, ge=16)
    timeout_seconds: float = Field(default=60.0, gt=0)
    concurrency: int = Field(default=16, ge=1, le=1024)
    max_attempts: int = Field(default=6, ge=1)
    backoff_seconds: float = Field(default=1.0, gt=0)  # doubled at every attempt, with jitter
    max_backoff_seconds: float = Field(default=60.0, gt=0)
    requests_per_minute: float | None = Field(default=None, gt=0)
    tokens_per_minute: float | None = Field(default=None, gt=0)
    budget_requests: int | None = Field(default=None, ge=0)
    budget_tokens: int | None = Field(default=None, ge=0)
    budget_cost: float | None = Field(default=None, ge=0)  # in the currency of the two prices
    price_per_million_input_tokens: float = Field(default=0.0, ge=0)
    price_per_million_output_tokens: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _checks(self) -> "ChatWriterOptions":
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url = {self.base_url!r}: expected http://... or https://...")
        priced = self.price_per_million_input_tokens + self.price_per_million_output_tokens > 0
        if self.budget_cost is not None and not priced:
            raise ValueError("budget_cost needs price_per_million_input_tokens or price_per_million_output_tokens")
        return self


WRITERS: dict[str, type[Options]] = {"templates": TemplateWriterOptions, "openai": ChatWriterOptions}


class FilterOptions(Options):
    """What is not kept. near_duplicate_bits: of 64, by which the perceptual hashes of two samples' pictures may differ
    at most, picture by picture, to be one; pose_bits: the same for two poses of a thing; null = not looked for."""

    min_answer_words: int = Field(default=2, ge=1)
    max_answer_words: int = Field(default=80, ge=1)
    max_instruction_words: int = Field(default=80, ge=1)
    answer_names_target: bool = True
    min_contrast: float = Field(default=8.0, ge=0)  # of the least visible thing, of 255
    near_duplicate_bits: int | None = Field(default=4, ge=0, le=16)
    pose_bits: int | None = Field(default=3, ge=0, le=16)


# ---------------------------------------------------------------- the build


class DomainShares(Options):
    """Parts of the samples that each domain makes up; scaled to a sum of one."""

    objects: float = Field(default=0.7, ge=0)
    icons: float = Field(default=0.15, ge=0)
    covers: float = Field(default=0.15, ge=0)

    @model_validator(mode="after")
    def _some(self) -> "DomainShares":
        if self.objects + self.icons + self.covers <= 0:
            raise ValueError("objects, icons and covers are all 0; at least one must not be")
        return self


class SplitShares(Options):
    """Parts of the identities, and of the samples, that each split gets. An identity is in one split alone."""

    train: float = Field(default=0.8, gt=0)
    validation: float = Field(default=0.1, ge=0)
    test: float = Field(default=0.1, ge=0)


class StageResources(Options):
    """What one worker of a stage takes. workers: null = as many as the cluster's CPUs (and GPUs) allow."""

    workers: int | None = Field(default=None, ge=1)
    num_cpus: float = Field(default=1.0, gt=0)
    num_gpus: float = Field(default=0.0, ge=0)
    batch_size: int | None = Field(default=None, ge=1)


class StagesResources(Options):
    """Resources by stage."""

    read: StageResources = StageResources()
    segment: StageResources = StageResources()
    plates: StageResources = StageResources()
    caption: StageResources = StageResources()
    compose: StageResources = StageResources()
    describe: StageResources = StageResources()
    fill: StageResources = StageResources()
    write: StageResources = StageResources()


class ExecutionOptions(Options):
    """backend: Ray Data (its own Ray on this machine, or the cluster at `address`), or "local": this process alone.

    On a cluster the work folder and the sources must be on a disk that every node sees.
    """

    backend: Literal["ray", "local"] = "ray"
    address: str | None = None  # null: RAY_ADDRESS, else a Ray of this machine's own
    num_cpus: int | None = Field(default=None, ge=1)  # of a Ray of this machine's own; null = all
    stages: StagesResources = StagesResources()


class BuildOptions(Options):
    """What is built, apart from the sections that have a `kind`.

    output: folder of the set. work: folder of what the stages made, kept for restarts; null = beside the output.
    oversample: samples planned for every one wanted, because filters take some.
    """

    name: str = Field(default="mmlink", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    output: str
    work: str | None = None
    seed: int = 0
    num_samples: int = Field(default=1000, ge=1)
    oversample: float = Field(default=1.08, ge=1)
    max_failed_fraction: float = Field(default=0.0, ge=0, le=1)
    domains: DomainShares = DomainShares()
    splits: SplitShares = SplitShares()
    pictures: PictureOptions = PictureOptions()
    plates: PlatesOptions = PlatesOptions()
    compose: ComposeOptions = ComposeOptions()
    filters: FilterOptions = FilterOptions()
    execution: ExecutionOptions = ExecutionOptions()


@dataclass(frozen=True)
class Choice:
    """A section that has a kind, read."""

    kind: str
    options: Options

    def dump(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.options.model_dump(mode="json")}


@dataclass(frozen=True)
class BuildConfig:
    """A whole configuration, checked."""

    build: BuildOptions
    sources: tuple[Choice, ...]
    segment: Choice
    fill: Choice
    captions: Choice
    writer: Choice

    def dump(self) -> dict[str, Any]:
        """As plain values; reading them again gives an equal configuration."""
        return {
            **self.build.model_dump(mode="json"),
            "sources": [source.dump() for source in self.sources],
            "segment": self.segment.dump(),
            "fill": self.fill.dump(),
            "captions": self.captions.dump(),
            "writer": self.writer.dump(),
        }


_DEFAULTS: dict[str, dict[str, Any]] = {
    "segment": {"kind": "u2net"},
    "fill": {"kind": "telea"},
    "captions": {"kind": "labels"},
    "writer": {"kind": "templates"},
}
_KINDS = {"segment": SEGMENTERS, "fill": FILLERS, "captions": CAPTIONERS, "writer": WRITERS}


def parse_config(values: Any, *, source: str) -> BuildConfig:
    """Check nested plain values as a configuration.

    Args:
        source: where they come from; named in every message.

    Raises:
        ConfigError: naming file, key and value, with the nearest name of an unknown key or kind.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: a configuration is a mapping of keys to values, found {type(values).__name__}")
    rest = {str(key): value for key, value in values.items()}
    given = rest.pop("sources", None)
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{source}: `sources` is a list of at least one `kind: {' | '.join(SOURCES)}`")
    sources = tuple(_choice(item, SOURCES, f"{source}: sources[{i}]") for i, item in enumerate(given))
    sections = {
        name: _choice(rest.pop(name, default), _KINDS[name], f"{source}: {name}") for name, default in _DEFAULTS.items()
    }
    _check_names(rest, source)
    return BuildConfig(build=parse_options(BuildOptions, rest, source=source), sources=sources, **sections)


def _choice(values: Any, kinds: dict[str, type[Options]], source: str) -> Choice:
    if not isinstance(values, dict) or "kind" not in values:
        raise ConfigError(f"{source}: expected a mapping with `kind: {' | '.join(kinds)}`, found {values!r}")
    rest = {str(key): value for key, value in values.items() if key != "kind"}
    kind = values["kind"]
    if kind not in kinds:
        near = difflib.get_close_matches(str(kind), list(kinds), n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known kinds: {', '.join(kinds)}"
        raise ConfigError(f"{source}: unknown kind {kind!r}; {hint}")
    return Choice(kind, parse_options(kinds[kind], rest, source=f"{source} ({kind})"))


def _check_names(rest: dict[str, Any], source: str) -> None:
    """Unknown sections are compared with those that have a kind too."""
    known = [*BuildOptions.model_fields, *_DEFAULTS, "sources"]
    for key in rest:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"known keys here: {', '.join(sorted(known))}"
            raise ConfigError(f"{source}: unknown key `{key}`; {hint}")
