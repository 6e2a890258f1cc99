"""One sample, looked at as closely as possible: its record parsed, its texts read, every image decoded."""

import hashlib
import json
import os
import re
import unicodedata
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from samtrain.core.errors import DataError
from samtrain.core.options import Options
from samtrain.core.sample import IMAGE_PLACEHOLDER, ImageRef, SampleRecord
from samtrain.data.decode import ImageTooLargeError, decode_image
from samtrain.data.index import Extent
from samtrain.data.lint.walk import WalkedSample

_IMAGE_MEMBER = re.compile(r"\d+\.(jpg|jpeg|png|webp)", re.IGNORECASE)
_ALLOWED_CONTROLS = frozenset("\n\r\t")


class Limits(Options):
    """What counts as oversized. The pixels' default is that of `data.max_image_pixels`."""

    max_image_pixels: int = 64_000_000
    max_member_bytes: int = 64 * 1024**2
    max_text_bytes: int = 64 * 1024


@dataclass(frozen=True)
class Chunk:
    """Some samples of one shard: what a process does at once."""

    split: str
    path: Path
    samples: list[WalkedSample]
    limits: Limits


@dataclass(slots=True)
class CheckedSample:
    """What the other checks, the index and the clean set need of a sample.

    content: digest of texts and images, equal where samples are equal under other keys; empty where unreadable.
    problems: (kind, reason).
    """

    split: str
    shard: str
    key: str
    start: int
    stop: int
    record: Extent = (0, 0)
    images: tuple[Extent, ...] = ()
    extras: dict[str, Extent] = field(default_factory=dict)
    task: str = ""
    text_bytes: int = 0
    content: bytes = b""
    problems: list[tuple[str, str]] = field(default_factory=list)


def check_chunk(chunk: Chunk) -> list[CheckedSample]:
    """Look at all samples of the chunk, in order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it becomes a finding
        try:
            descriptor = os.open(chunk.path, os.O_RDONLY)
        except OSError as error:
            reason = f"cannot be opened any more: {error}"
            return [_unreadable(chunk, sample, reason) for sample in chunk.samples]
        try:
            return [_Check(chunk, sample, descriptor).run() for sample in chunk.samples]
        finally:
            os.close(descriptor)


def _unreadable(chunk: Chunk, sample: WalkedSample, reason: str) -> CheckedSample:
    problems = [("unreadable-shard", reason)]
    return CheckedSample(chunk.split, chunk.path.name, sample.key, sample.start, sample.stop, problems=problems)


class _Missing(Exception):
    """Bytes that are not there or that nobody should read; the problem is noted."""


class _Check:
    def __init__(self, chunk: Chunk, sample: WalkedSample, descriptor: int) -> None:
        self.limits = chunk.limits
        self.members = sample.members
        self.descriptor = descriptor
        self.found = CheckedSample(
            chunk.split, chunk.path.name, sample.key, sample.start, sample.stop, problems=list(sample.problems)
        )

    def run(self) -> CheckedSample:
        record = self._record()
        if record is None:
            return self.found
        for name in ("instruction", "output"):
            self._text(name, getattr(record, name))
        hashes = [self._image(image) for image in record.images]
        listed = {self._extension(image.file) for image in record.images}
        for extension in self.members:
            if extension not in listed and _IMAGE_MEMBER.fullmatch(extension):
                self._add("unlisted-image", f"{self.found.key}.{extension} is not in the record")
        self.found.images = tuple(self.members.get(self._extension(image.file), (0, 0)) for image in record.images)
        self.found.extras = {
            extension: extent
            for extension, extent in self.members.items()
            if extension != "json" and extension not in listed and not _IMAGE_MEMBER.fullmatch(extension)
        }
        self.found.task = record.task
        if all(hashes):
            content = json.dumps([record.instruction, record.output, hashes])
            self.found.content = hashlib.blake2b(content.encode(errors="replace"), digest_size=16).digest()
        return self.found

    def _add(self, kind: str, reason: str) -> None:
        self.found.problems.append((kind, reason))

    def _extension(self, file: Any) -> str:
        """Of a member that a record names: its name without the key; "" for what is no name of this sample."""
        prefix = f"{self.found.key}."
        return file.removeprefix(prefix) if isinstance(file, str) and file.startswith(prefix) else ""

    def _read(self, extension: str) -> bytes:
        offset, size = self.members[extension]
        if size > self.limits.max_member_bytes:
            self._add(
                "oversized-member", f"{extension}: {size} bytes, more than {self.limits.max_member_bytes} are allowed"
            )
            raise _Missing
        try:
            data = os.pread(self.descriptor, size, offset)
        except OSError as error:
            self._add("unreadable-shard", f"{extension}: {error}")
            raise _Missing from None
        if len(data) != size:
            kind = "broken-record" if extension == "json" else "broken-image"
            self._add(kind, f"{extension}: {len(data)} of {size} bytes: the shard was cut off")
            raise _Missing
        return data

    def _record(self) -> SampleRecord | None:
        """The record where it can be used; what is wrong with it is noted one by one."""
        if "json" not in self.members:
            self._add("missing-record", f"it has {', '.join(sorted(self.members)) or 'no members'}")
            return None
        self.found.record = self.members["json"]
        try:
            data = self._read("json")
            values = json.loads(data.decode())
            placeholders = values["instruction"].count(IMAGE_PLACEHOLDER)
            num_images = len(values["images"])
            images = tuple(ImageRef(**image) for image in values.pop("images"))
            record = SampleRecord(images=images, **values)
            self.found.text_bytes = len(record.instruction.encode()) + len(record.output.encode())
        except _Missing:
            return None
        except UnicodeDecodeError as error:
            self._add("broken-record", f"not UTF-8 at byte {error.start}")
            return None
        except UnicodeEncodeError as error:  # "\ud800" in JSON
            self._add("broken-record", f"half a surrogate pair at character {error.start} of a text")
            return None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self._add("broken-record", f"{type(error).__name__}: {error}")
            return None
        wrong = [name for name in ("key", "task", "source") if not isinstance(getattr(record, name), str)]
        if wrong:
            self._add("broken-record", f"`{wrong[0]}` is {getattr(record, wrong[0])!r}, expected text")
            return None
        if record.key != self.found.key:
            self._add("wrong-key", f"its record says {record.key!r}")
        if placeholders not in (0, num_images):
            self._add("wrong-count", f"{placeholders} {IMAGE_PLACEHOLDER} placeholders, {num_images} images")
        return record

    def _text(self, name: str, text: str) -> None:
        size, limit = len(text.encode()), self.limits.max_text_bytes
        if size > limit:
            self._add("oversized-text", f"{name}: {size} bytes, more than {limit} are allowed")
        if not text.replace(IMAGE_PLACEHOLDER, "").strip():
            self._add("empty-text", f"{name} {text[:40]!r} has no words")
        odd = next((i for i, char in enumerate(text) if _is_unreadable(char)), None)
        if odd is not None:
            near = text[max(0, odd - 10) : odd + 10]
            self._add("unreadable-text", f"{name}: U+{ord(text[odd]):04X} at character {odd}, in {near!r}")

    def _image(self, image: ImageRef) -> str:
        """The sha256 of an image's bytes, after every check; "" where they cannot be read."""
        extension = self._extension(image.file)
        if extension not in self.members:
            there = ", ".join(sorted(self.members))
            self._add("missing-image", f"its record names {image.file!r}, the tar has {there}")
            return ""
        try:
            data = self._read(extension)
        except _Missing:
            return ""
        digest = hashlib.sha256(data).hexdigest()
        if image.sha256 and digest != image.sha256:
            self._add("wrong-hash", f"{extension}: sha256 is {digest[:12]}..., its record says {image.sha256!s:.12}...")
        try:
            size = decode_image(data, max_pixels=self.limits.max_image_pixels, where=extension).size
        except ImageTooLargeError as error:
            self._add("oversized-image", str(error))
        except DataError as error:
            self._add("broken-image", str(error))
        else:
            said = (image.width, image.height)
            # The record has the size as stored; a camera's orientation swaps width and height.
            if said not in (size, size[::-1]):
                self._add("wrong-size", f"{extension}: {size[0]} x {size[1]}, its record says {said[0]} x {said[1]}")
        return digest


def _is_unreadable(char: str) -> bool:
    """Replacement characters, controls, halves of surrogate pairs, and what Unicode says is no character."""
    code = ord(char)
    if char == "\ufffd" or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE:
        return True
    return char not in _ALLOWED_CONTROLS and unicodedata.category(char) in ("Cc", "Cs")
