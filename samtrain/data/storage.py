"""Objects in a store (S3, Google Cloud Storage, Azure, HTTP), read by ranges; the only place that imports fsspec.

Nobody here trusts the store: what it says of itself is compared with the index, and no answer is longer than what was
asked for. What may pass (a reset connection, a timeout, 429, 5xx, a short answer) is tried again; an object that is
missing, forbidden or no longer the one seen first is an error that names the URL.

Credentials come from the environment as each store's own tools have them (AWS_*, GOOGLE_APPLICATION_CREDENTIALS,
AZURE_STORAGE_*, ~/.netrc); a URL that holds any is refused.
"""

import copy
import errno
import random
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from samtrain.core.errors import ConfigError, DataError
from samtrain.core.log import logger

# scheme -> what has to be installed for it: `pip install 'samtrain[s3]'`
EXTRAS = {"s3": "s3", "gs": "gs", "az": "azure", "abfs": "azure", "https": "", "http": ""}
LOAD_RETRY_SECONDS = 30.0  # of what a run begins with: somebody waits for the message
CONNECT_SECONDS = 10
READ_SECONDS = 30  # without a byte
ANSWER_SECONDS = 300
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
_PIECE = 32 * 1024**2
_LOOKS_LIKE_A_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+,@-]*")
_PASSING_STATUS = {408, 425, 429}
# By name, because their libraries are optional: botocore's, Azure's and s3fs' errors that are no OSError.
_PASSING = {"HTTPClientError", "ResponseParserError", "ServiceRequestError", "ServiceResponseError", "RequestError"}
_LASTING = {"FileExpired", "InvalidURL", "ClientConnectorCertificateError"}
_LASTING_ERRNO = {errno.EINVAL, errno.EPERM, errno.ENAMETOOLONG}


@dataclass(frozen=True)
class Url:
    """A folder or an object in a store; `url / name` and `url.name` as of a Path."""

    text: str

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self.text}/{name}")

    def __str__(self) -> str:
        return self.text

    @property
    def name(self) -> str:
        return self.text.rpartition("/")[2]

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.text.split("/"))

    @property
    def scheme(self) -> str:
        return self.text.partition(":")[0]


Location = Path | Url


def parse_location(place: str | Location) -> Location:
    """A local folder, or a URL in a store that is allowed.

    Raises:
        ConfigError: another kind of URL, or one that holds credentials or a query.
    """
    if isinstance(place, Url):
        return place
    text = str(place)
    if not ("://" in text or "::" in text or _LOOKS_LIKE_A_URL.match(text)):
        return Path(place)
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in EXTRAS or "::" in text:
        known = ", ".join(f"{name}://" for name in EXTRAS)
        raise ConfigError(f"{text!r}: a set is a local folder (`./` in front of odd names) or one of {known}")
    try:
        parts = urlsplit(text)
        has_port = parts.port is not None
    except ValueError as error:
        raise ConfigError(f"{text!r}: not a URL: {error}") from None
    if (parts.username is not None and scheme != "abfs") or parts.password is not None:
        raise ConfigError(f"{scheme}://...@{parts.hostname}: no credentials in a URL; the environment holds them")
    if parts.query or parts.fragment or not parts.hostname or (has_port and not scheme.startswith("http")):
        raise ConfigError(f"{text!r}: a URL of a folder has a host or bucket and a path, and no `?` or `#`")
    if not text.isascii() or not text.isprintable() or any(c in rest for c in ' \\"') or ".." in rest.split("/"):
        raise ConfigError(f"{text!r}: a URL is printable ASCII without spaces, backslashes and `..`")
    return Url(text.rstrip("/"))


def is_object_name(name: Any) -> bool:
    """Whether an untrusted name is that of an object in the folder itself, and means nothing else in any URL."""
    return isinstance(name, str) and len(name) <= 255 and _NAME.fullmatch(name) is not None


class Store:
    """The objects of one folder; safe from any thread.

    Args:
        retry_seconds: how long what may pass is tried again, for one range and for the store as a whole.
    """

    def __init__(self, folder: Url, *, retry_seconds: float) -> None:
        self.folder = folder
        self.retry_seconds = retry_seconds
        self._is_http = folder.scheme in ("http", "https")
        self._system = _open_system(folder)
        self._lock = threading.Lock()
        self._down_since: float | None = None  # since when nothing could be read
        self._tags: dict[str, str] = {}  # object -> what HTTP calls its version
        self._listing: dict[str, int] | None = None
        self._is_listed = False

    def with_patience(self, seconds: float) -> "Store":
        """The same store, tried again for `seconds` at most."""
        store = copy.copy(self)
        store.retry_seconds = min(seconds, self.retry_seconds)
        return store

    def listing(self) -> dict[str, int] | None:
        """Size of every object in the folder, by name, as it was when first asked for; None: this store cannot tell.

        Raises:
            DataError: there is no such folder.
        """
        if not self._is_listed and not self._is_http:
            try:
                found = self._retried(lambda: self._system.ls(str(self.folder), detail=True), str(self.folder))
                self._listing = {
                    one["name"].rstrip("/").rpartition("/")[2]: int(one.get("size") or 0)
                    for one in found
                    if one["type"] == "file"
                }
            except _Forbidden:
                logger.info("%s: may be read but not listed; shards are looked at when first read", self.folder)
        self._is_listed = True
        return self._listing

    def folders(self) -> list[str] | None:
        """Names of the folders in this one; None: this store cannot tell."""
        if self._is_http:
            return None
        found = self._retried(lambda: self._system.ls(str(self.folder), detail=True), str(self.folder))
        return sorted(one["name"].rstrip("/").rpartition("/")[2] for one in found if one["type"] == "directory")

    def size(self, name: str) -> int:
        """Bytes of an object."""
        listing = self.listing()
        if listing is not None:
            if name not in listing:
                raise DataError(f"{self.folder / name}: not there")
            return listing[name]
        return self._retried(lambda: self._probe(name), str(self.folder / name))

    def read_whole(self, name: str, *, max_bytes: int) -> bytes:
        """An object.

        Raises:
            DataError: it is missing, larger than `max_bytes`, or cannot be read.
        """
        size = self.size(name)
        if size > max_bytes:
            raise DataError(f"{self.folder / name}: {size} bytes, more than the {max_bytes} allowed for it")
        pieces = [
            self.read(name, start, min(size, start + _PIECE), object_size=size) for start in range(0, size, _PIECE)
        ]
        return b"".join(pieces)

    def read(self, name: str, start: int, stop: int, *, object_size: int) -> bytes:
        """Bytes `start` to `stop` of an object that must have `object_size` bytes.

        Raises:
            DataError: naming URL and range.
        """
        where = f"{self.folder / name}: bytes {start}-{stop}"
        if start == stop:
            return b""

        def attempt() -> bytes:
            data = self._fetch(name, start, stop, object_size)
            if len(data) != stop - start:
                raise EOFError(f"{len(data)} of {stop - start} bytes came")
            return data

        return self._retried(attempt, where)

    def _fetch(self, name: str, start: int, stop: int, object_size: int) -> bytes:
        url = str(self.folder / name)
        if self._is_http:
            answer = _Answer(url, start, stop)
            with self._system.open(url, "rb", cache_type="none", size=stop, trace_request_ctx=answer) as stream:
                stream.seek(start)
                data: bytes = stream.read(stop - start)
            self._compare(name, answer.size, object_size, answer.tag)
            return data
        # s3fs asks for the version (ETag) that was listed or seen when the object is opened.
        with self._system.open(url, "rb", cache_type="none") as stream:
            self._compare(name, stream.size, object_size, "")
            stream.seek(start)
            data = stream.read(stop - start)
            return data

    def _probe(self, name: str) -> int:
        url = str(self.folder / name)
        if not self._is_http:
            return int(self._system.info(url)["size"])
        answer = _Answer(url, 0, 1)
        with self._system.open(url, "rb", cache_type="none", size=1, trace_request_ctx=answer) as stream:
            stream.read(1)
        return answer.size

    def _compare(self, name: str, size: int, expected: int, tag: str) -> None:
        if size != expected:
            what = "it was cut off" if size < expected else "it was replaced"
            raise DataError(f"{self.folder / name}: {size} bytes, the index says {expected}: {what}; copy it again")
        with self._lock:
            seen = self._tags.setdefault(name, tag)
        if tag != seen:
            raise DataError(f"{self.folder / name}: was replaced while it is read: ETag {tag}, first {seen}")

    def _retried(self, attempt: Any, where: str) -> Any:
        started, tries = time.monotonic(), 0
        while True:
            try:
                found = attempt()
            except DataError:
                raise
            except Exception as error:
                tries += 1
                now = time.monotonic()
                with self._lock:
                    down_since = self._down_since = self._down_since or now
                if not _may_pass(error):
                    self._down_since = None  # it answers
                    raise _lasting(error, where) from None
                wait = _wait(error, tries)
                if now + wait > min(started, down_since) + self.retry_seconds:
                    raise DataError(
                        f"{where}: cannot be read: {_short(error)} ({tries} attempts in {now - started:.0f} s); is the "
                        f"store reachable from here? data.remote.retry_seconds says how long to try"
                    ) from None
                if tries == 1:
                    logger.info("%s: %s; trying again", where, _short(error))
                time.sleep(wait)
            else:
                self._down_since = None
                return found


class _Forbidden(DataError):
    """The store says no."""


class _Answer:
    """What one HTTP answer must be, and what it says of its object. Made for each request; filled by `_check_answer`.

    size: of the whole object, bytes. tag: its strong ETag, or "".
    """

    def __init__(self, url: str, start: int, stop: int) -> None:
        self.url = url
        self.start = start
        self.stop = stop
        self.size = -1
        self.tag = ""

    def read(self, status: int, headers: Any) -> None:
        """Take in the headers, before the body is read.

        Raises:
            DataError: they are not an answer to this request.
        """
        if status == 416:
            raise DataError(f"{self.url}: has no bytes {self.start}-{self.stop}: it was cut off; copy it again")
        if status == 200:
            raise DataError(
                f"{self.url}: this server does not answer range requests; serve the shards with one that does"
            )
        if status != 206:
            return  # an error: raised from its status
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range", ""))
        length = headers.get("Content-Length", "")
        if not found or not length.isdecimal() or headers.get("Content-Encoding", "identity") != "identity":
            raise DataError(
                f"{self.url}: an answer to a range request needs Content-Range with the whole size, Content-Length and "
                f"no Content-Encoding; this server does otherwise"
            )
        first, last, self.size = (int(number) for number in found.groups())
        if first != self.start or last + 1 != min(self.stop, self.size) or int(length) != last + 1 - first:
            raise DataError(f"{self.url}: asked for bytes {self.start}-{self.stop}, the server sends {found[0]}")
        tag = headers.get("ETag", "")
        self.tag = "" if tag.startswith("W/") else tag


async def _check_answer(session: Any, context: Any, params: Any) -> None:
    try:
        context.trace_request_ctx.read(params.response.status, params.response.headers)
    except DataError:
        params.response.close()  # without its body
        raise


def _open_system(folder: Url) -> Any:
    """The file system of fsspec; no request is made.

    Raises:
        ConfigError: its library is not installed.
    """
    import fsspec

    options: dict[str, Any] = {}
    try:
        if folder.scheme in ("http", "https"):
            import aiohttp

            trace = aiohttp.TraceConfig()
            trace.on_request_end.append(_check_answer)
            timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
            options["client_kwargs"] = {"timeout": timeout, "trace_configs": [trace], "trust_env": True}
            options["headers"] = {"Accept-Encoding": "identity"}
        elif folder.scheme == "s3":
            # Tried again here, and nowhere else.
            retries = {"total_max_attempts": 1}
            options["config_kwargs"] = {
                "connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS, "retries": retries
            }  # fmt: skip
        elif folder.scheme == "gs":
            options["requests_timeout"] = READ_SECONDS
        system = fsspec.filesystem(folder.scheme, skip_instance_cache=True, **options)
    except ImportError as error:
        raise ConfigError(
            f"{folder}: {folder.scheme}:// needs `pip install 'samtrain[{EXTRAS[folder.scheme]}]'` ({error})"
        ) from None
    if folder.scheme == "s3":
        system.retries = 1
    return system


def _status(error: BaseException) -> int:
    """The HTTP status an error stands for, or 0."""
    for name in ("status", "status_code", "code"):
        value = getattr(error, name, None)
        if isinstance(value, (int, str)) and str(value).isdecimal():
            return int(value)
    return 0


def _may_pass(error: Exception) -> bool:
    names = {one.__name__ for one in type(error).__mro__}
    status = _status(error)
    if names & _LASTING or isinstance(error, (FileNotFoundError, PermissionError)):
        return False
    if status:
        return status in _PASSING_STATUS or status >= 500
    if isinstance(error, OSError):
        return error.errno not in _LASTING_ERRNO
    return isinstance(error, (TimeoutError, EOFError)) or bool(names & _PASSING) or _is_of_aiohttp(error)


def _is_of_aiohttp(error: Exception) -> bool:
    return any(one.__module__.startswith("aiohttp.") and one.__name__ == "ClientError" for one in type(error).__mro__)


def _wait(error: Exception, tries: int) -> float:
    """Seconds until the next attempt: doubling, with jitter so that ranks do not come back all at once; at least what
    the store asks for."""
    wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)
    asked = str((getattr(error, "headers", None) or {}).get("Retry-After", ""))
    return max(wait, min(float(asked), 2 * _LONGEST_WAIT)) if asked.isdecimal() else wait


def _lasting(error: Exception, where: str) -> DataError:
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status == 404:
        return DataError(f"{where}: not there")
    if isinstance(error, PermissionError) or status in (401, 403):
        return _Forbidden(f"{where}: access denied ({_short(error)}); the environment holds the credentials")
    if type(error).__name__ == "FileExpired":
        return DataError(f"{where}: was replaced while it is read")
    return DataError(f"{where}: cannot be read: {_short(error)}")


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
