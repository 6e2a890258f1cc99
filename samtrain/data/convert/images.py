"""Images by name, below one folder and nowhere else.

Names come from files that others wrote: a name that leads out of the folder (`..`, an absolute path, a link) or is a
URL is refused, and so is what is no plain file, has too many bytes or too many pixels. Bytes are copied as they are.
"""

import base64
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from samtrain.core.errors import DataError
from samtrain.data.shards import sniff_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*://|pipe:)", re.IGNORECASE)
_DATA_URI = re.compile(r"data:image/[a-z]+;base64,", re.IGNORECASE)


class ImageFolder:
    """The images below `root`.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(self, root: Path, *, max_bytes: int, max_pixels: int) -> None:
        if not root.is_dir():
            raise DataError(
                f"{root}: no such folder of images; --images gives the one that image names are relative to"
            )
        self.root = root
        self.max_bytes = max_bytes
        self.max_pixels = max_pixels
        self._real = os.path.realpath(root)

    def read(self, name: str) -> bytes:
        """The file's bytes, of an image within the limits.

        Raises:
            DataError: it is not there, not inside, not an image, or too large.
        """
        path = self._resolve(name)
        try:
            # NONBLOCK: a pipe is refused below, not waited for.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            raise DataError(f"image {name!r} is not there") from None
        except OSError as error:
            raise DataError(f"image {name!r} cannot be opened: {error.strerror}") from None
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise DataError(f"image {name!r} is not a plain file")
        with open(descriptor, "rb") as stream:
            if status.st_size > self.max_bytes:
                raise DataError(f"image {name!r} has {status.st_size} bytes, more than {self.max_bytes}")
            data = stream.read(self.max_bytes + 1)
        self.check(data, f"image {name!r}")
        return data

    def check(self, data: bytes, where: str) -> None:
        """Refuse bytes that are no JPEG, PNG or WEBP, or too many of them, from the header alone."""
        if len(data) > self.max_bytes:
            raise DataError(f"{where} has more than {self.max_bytes} bytes")
        _, width, height = sniff_image(data, where=where)
        if width * height > self.max_pixels:
            raise DataError(f"{where} has {width} x {height} pixels, more than {self.max_pixels}")

    def find(self, folders: Iterable[str], stem: str) -> str:
        """The name of the image called `stem`, whatever its suffix, in the first of `folders` that holds it.

        Raises:
            DataError: none does.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", stem):
            raise DataError(f"image id {stem[:60]!r} is not one: letters and digits were expected")
        for folder in folders:
            for suffix in (*SUFFIXES, ".JPG", ".JPEG", ".PNG", ".gif", ".GIF"):  # a GIF is found, and refused as one
                if (self.root / folder / f"{stem}{suffix}").exists():
                    return f"{folder}/{stem}{suffix}"
        raise DataError(f"image {stem!r} is not there")

    def _resolve(self, name: str) -> str:
        """The real path of a name, inside the folder."""
        if not name or "\0" in name:
            raise DataError(f"image {name!r} is not a file name")
        if _URL.match(name):
            raise DataError(f"image {name[:100]!r} is a URL; nothing is fetched: download it and give its path")
        try:
            path = os.path.realpath(os.path.join(self._real, name))
        except (OSError, ValueError) as error:
            raise DataError(f"image {name!r} is not a file name: {error}") from None
        if not path.startswith(self._real.rstrip("/") + "/"):
            raise DataError(f"image {name!r} leads out of the image folder; --images gives another")
        return path


def is_inline(name: str) -> bool:
    """Whether an image stands in the record itself, as a data URI."""
    return name[:5].lower() == "data:"


def inline_image(uri: str, *, max_bytes: int) -> bytes:
    """The bytes of a data URI.

    Raises:
        DataError: it is no base64 image, or too large.
    """
    match = _DATA_URI.match(uri)
    if match is None:
        raise DataError(f"image {uri[:40]!r}... is a data URI, but not `data:image/...;base64,`")
    if (len(uri) - match.end()) * 3 // 4 > max_bytes:
        raise DataError(f"an image in a data URI has more than {max_bytes} bytes")
    try:
        return base64.b64decode(uri[match.end() :], validate=True)
    except ValueError as error:
        raise DataError(f"image {uri[:40]!r}...: not base64: {error}") from None
