"""The shard record, and what the data part needs to know of a model: how to encode a text and an image.

data and model never import each other; they meet here.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from samtrain.core.errors import DataError

if TYPE_CHECKING:  # who only reads records starts without torch: 3 s and 200 MB for every process
    from PIL import Image
    from torch import Tensor

IMAGE_PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class ImageRef:
    """One image of a record: its member name inside the tar (`key.0.jpg`), size in pixels, digest of the bytes."""

    file: str
    width: int
    height: int
    sha256: str


@dataclass(frozen=True)
class SampleRecord:
    """One multi-image sample, stored as `key.json` in a shard.

    instruction: holds one `<image>` placeholder per image (interleaved layout) or none (prefix layout).
    task: the set it belongs to (scores are kept per task). source: where it came from. meta: anything JSON.
    """

    key: str
    task: str
    instruction: str
    output: str
    images: tuple[ImageRef, ...]
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)

    @staticmethod
    def from_json(text: str | bytes, *, where: str) -> "SampleRecord":
        """Parse and check a record.

        Raises:
            DataError: naming `where`, the key and what is wrong.
        """
        try:
            values = json.loads(text)
            images = tuple(ImageRef(**image) for image in values.pop("images"))
            record = SampleRecord(images=images, **values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{where}: not a sample record: {error!r}") from None
        for name in ("key", "task", "instruction", "output", "source"):
            if not isinstance(getattr(record, name), str):
                raise DataError(f"{where}: `{name}` is {getattr(record, name)!r}, expected text")
        placeholders = record.instruction.count(IMAGE_PLACEHOLDER)
        if placeholders not in (0, len(record.images)):
            raise DataError(
                f"{where}: {record.key}: the instruction has {placeholders} {IMAGE_PLACEHOLDER} placeholders "
                f"but the sample has {len(record.images)} images; write one for each image, or none"
            )
        return record


@dataclass(frozen=True)
class EncodedText:
    """A sample's text as tokens. Image spans stand in input_ids; labels carry IGNORE_INDEX on all of the prompt."""

    input_ids: list[int]
    labels: list[int]
    qformer_input_ids: list[int]

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


class SampleEncoder(Protocol):
    """What the loader and the evaluator need of a model's processor."""

    image_token_id: int
    num_query_tokens: int
    pad_token_id: int
    qformer_pad_token_id: int

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels."""
        ...

    def encode(self, *, key: str, instruction: str, output: str | None, num_images: int) -> EncodedText:
        """Tokens of one sample; `output=None` encodes a prompt for generation.

        Raises:
            DataError: where placeholders and images disagree, naming the key and both counts.
        """
        ...

    def pixel_values(self, image: "Image.Image | Tensor") -> "Tensor":
        """[3, image_size, image_size] float32: bicubic resize (if needed), scaled, normalised.

        Args:
            image: a picture, or one that already has the size, as [3, image_size, image_size] uint8.
        """
        ...
