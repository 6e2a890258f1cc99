"""The `data:` section of a recipe: shards, budgets, order, bad samples."""

from typing import Literal

from pydantic import Field, model_validator

from samtrain.core.options import Options

MIN_SHARE = 1e-6  # of a source in a mixture


class MiniOptions(Options):
    """How `mmlink-mini` is built where `data.build: mmlink-mini` finds no shards yet.

    num_train, num_eval: at most so many stories too, in `train_story` and in `validation_story` and `test_story`.
    stories: build these splits where the game "Battle for Wesnoth" is installed, always (or it is an error), or never.
    story_sources: the folder of the game; null = look in the usual places.
    """

    num_train: int = Field(default=4000, ge=1)
    num_eval: int = Field(default=200, ge=1)  # samples of each held-out split
    max_identities: int | None = Field(default=None, ge=4)  # fewer things to learn for short runs; null = all
    seed: int = 0
    stories: Literal["if_installed", "required", "never"] = "if_installed"
    story_sources: str | None = None


class RemoteOptions(Options):
    """How sets in an object store are read.

    cache_dir: a folder on a local disk, shared by the processes of a node; null = samtrain/shards in the user's cache
        folder (XDG_CACHE_HOME).
    cache_bytes: what the cache takes there at most; a second epoch makes no request where the set is smaller. null =
        half of what the disk has free besides it; 0 = no cache.
    retry_seconds: how long reading is tried again where the store fails, before a shard is given up.
    """

    cache_dir: str | None = None
    cache_bytes: int | None = Field(default=None, ge=0)
    retry_seconds: float = Field(default=300.0, ge=0, allow_inf_nan=False)


class SourceOptions(Options):
    """One source of a mixture.

    name: in front of its keys and shards in ledger and log: `name/key`.
    path: as `data.path`. split: null = data.train_split.
    weight: its share of the samples that are met, relative to the other sources' weights.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    path: str = Field(min_length=1)
    weight: float = Field(gt=0, allow_inf_nan=False)
    split: str | None = None


class DataOptions(Options):
    """Shards and how they become batches.

    path: folder with one sub-folder per split, each with shards and their index; or the URL of such a folder in an
        object store (s3://, gs://, az://, abfs://, https://, http://). Credentials come from the environment.
    remote: how sets in an object store are read.
    mixture: what to train on, in place of the training split of `path`; that then names the held-out splits alone.
        An epoch is as many samples as the sources hold together; each source runs through epochs of its own.
    shuffle: `full`: all samples of an epoch together. `shards`: the shards of an epoch are shuffled, and the samples
        of `shuffle_block_shards` shards at a time, so each shard is read about once an epoch and few at a time: for
        shards in an object store. `none`: as the set has them.
    retry_quarantined: a run that resumes reads the shards again that were given up before: after they were mended.
    build: build the set there when it is missing.
    max_tokens, max_images: budgets of one pack (a micro-batch); the largest sample must fit.
    reduced_decode: in training, decode a JPEG at 1/2, 1/4 or 1/8 where the part that is seen keeps `image_size` pixels
        each way: less time for large pictures, and values that differ a little (by 0.7 of 255 on average where it was
        measured). Evaluation and generation always decode in full.
    max_bad_fraction: the run stops when more of the samples could not be used: of those seen so far, together with
        the share of the set that is in quarantined shards.
    verify_hashes: check every image against the sha256 in its record before it is decoded (0.1 ms per 150 kB); else
        damage that still decodes goes unnoticed. Images from an object store are always checked.
    """

    path: str = ""
    mixture: list[SourceOptions] = Field(default_factory=list)
    remote: RemoteOptions = RemoteOptions()
    build: Literal["mmlink-mini"] | None = None
    mini: MiniOptions = MiniOptions()
    train_split: str = "train"
    validation_split: str | None = "validation"
    image_size: int = Field(default=224, ge=1)
    augment: bool = True  # RandomResizedCrop (0.5-1) and horizontal flip, as the authors train
    reduced_decode: bool = True
    horizontal_flip: bool = True  # off where answers name places (left, right)
    shuffle: Literal["full", "shards", "none"] = "full"
    shuffle_block_shards: int = Field(default=16, ge=1)
    max_tokens: int = Field(default=2048, ge=1)
    max_images: int = Field(default=32, ge=1)
    max_image_pixels: int = Field(default=64_000_000, ge=1)
    num_workers: int = Field(default=1, ge=0)  # threads that decode ahead
    prefetch_steps: int = Field(default=2, ge=1)
    max_bad_fraction: float = Field(default=0.02, ge=0, le=1)
    verify_hashes: bool = False
    retry_quarantined: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> "DataOptions":
        if not self.mixture and not self.path:
            raise ValueError("data.path is required and missing (or data.mixture, to train on several sources)")
        needs_path = {"data.validation_split": self.validation_split, "data.build": self.build}
        for key, value in needs_path.items():
            if value and not self.path:
                raise ValueError(
                    f"{key} is {value!r} and data.path, where it would be, is missing; set it, or {key}: null"
                )
        _check_mixture(self.mixture)
        return self


def _check_mixture(sources: list[SourceOptions]) -> None:
    """Raises ValueError where sources are not apart, or one is too rare."""
    by_name: dict[str, SourceOptions] = {}
    by_place: dict[tuple[str, str | None], str] = {}
    for source in sources:
        if source.name in by_name:
            raise ValueError(f"data.mixture: two sources have the name {source.name!r}; its keys would be ambiguous")
        place = (source.path, source.split)
        if place in by_place:
            raise ValueError(
                f"data.mixture: {by_place[place]!r} and {source.name!r} are the same samples; list them once, with "
                f"the sum of the weights"
            )
        by_name[source.name], by_place[place] = source, source.name
    total = sum(source.weight for source in sources)
    for source in sources:
        if source.weight < MIN_SHARE * total:
            raise ValueError(
                f"data.mixture: {source.name!r} has weight {source.weight} of {total} in all, less than one sample in "
                f"a million; leave it out, or give it more"
            )
