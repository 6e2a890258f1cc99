"""What `samtrain data convert` can be told."""

from typing import Literal

from pydantic import Field

from samtrain.core.options import Options


class ConvertOptions(Options):
    """format: what `source` is. to: what `output` becomes; one of the two is `shards`.

    images: the folder image names are relative to (default: where the format has them).
    split, task: names where the format has none of its own.
    layout: `prefix` leaves texts as they are; `interleaved` writes one `<image>` for each image.
    instructions: a JSON list of instructions, or a DEMON file that holds some, instead of the built-in ones.
    limit: a split ends with the record that brings so many samples.
    max_bad_fraction: more broken records than this stop the conversion; nothing is written but the report.
    strict: the first broken record stops it.
    """

    format: str
    source: str
    output: str
    to: Literal["shards", "annotations", "messages"] = "shards"
    images: str | None = None
    split: str | None = None
    task: str | None = None
    layout: Literal["prefix", "interleaved"] = "prefix"
    instructions: str | None = None
    group_size: int = Field(default=5, ge=2, le=64)
    seed: int = 0
    limit: int | None = Field(default=None, ge=1)
    strict: bool = False
    max_bad_fraction: float = Field(default=0.02, ge=0, le=1)
    report: str | None = None
    max_image_pixels: int = Field(default=64_000_000, ge=1)
    max_image_bytes: int = Field(default=64 * 1024**2, ge=1)
    max_images: int = Field(default=256, ge=1)
    max_text_bytes: int = Field(default=65536, ge=1)  # of instruction, of answer; as `samtrain data lint`
    max_samples_per_shard: int = Field(default=500, ge=1)
    max_shard_bytes: int = Field(default=512 * 1024**2, ge=1)
