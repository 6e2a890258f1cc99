"""The `data:` section of a recipe: shards, budgets, order, bad samples."""

from typing import Literal

from pydantic import Field

from samtrain.core.options import Options


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


class DataOptions(Options):
    """Shards and how they become batches.

    path: folder with one sub-folder per split, each with shards and their index.
    build: build the set there when it is missing.
    max_tokens, max_images: budgets of one pack (a micro-batch); the largest sample must fit.
    max_bad_fraction: the run stops when more of the samples could not be used: of those seen so far, together with
        the share of the set that is in quarantined shards.
    verify_hashes: check every image against the sha256 in its record before it is decoded (0.1 ms per 150 kB); else
        damage that still decodes goes unnoticed.
    """

    path: str
    build: Literal["mmlink-mini"] | None = None
    mini: MiniOptions = MiniOptions()
    train_split: str = "train"
    validation_split: str | None = "validation"
    image_size: int = Field(default=224, ge=1)
    augment: bool = True  # RandomResizedCrop (0.5-1) and horizontal flip, as the authors train
    horizontal_flip: bool = True  # off where answers name places (left, right)
    shuffle: bool = True
    max_tokens: int = Field(default=2048, ge=1)
    max_images: int = Field(default=32, ge=1)
    max_image_pixels: int = Field(default=64_000_000, ge=1)
    num_workers: int = Field(default=1, ge=0)  # threads that decode ahead
    prefetch_steps: int = Field(default=2, ge=1)
    max_bad_fraction: float = Field(default=0.02, ge=0, le=1)
    verify_hashes: bool = False
