"""Large JSON files, one record at a time, with the standard library's own decoder.

`json.JSONDecoder.raw_decode` is applied to a window of the file that grows until one value is whole, so memory holds
a record and not the file. ijson was tried and put away: its fast backend turns half surrogate pairs into `?` without
a word, and a file of nested brackets makes it use memory with the square of their depth.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from samtrain.core.errors import DataError

CHUNK = 1 << 18  # characters
MAX_RECORD = 64 * 1024**2  # characters of one record
HEAD = 20  # records looked at to recognise a format
_DECODER = json.JSONDecoder()
_SPACE = " \t\r\n"


@dataclass(frozen=True)
class Element:
    """One value of a file.

    number: 0, 1, 2, ... done: bytes of the file read so far, of `total`. problem: why it is no value.
    """

    number: int
    value: Any
    done: int
    total: int
    problem: str | None = None


@dataclass(frozen=True)
class Head:
    """The beginning of a file: enough to tell what it is.

    kind: "array" or "lines" (`records` holds the first ones), "object" (`fields` holds each top-level field: the first
    elements of an array, or the value alone in a list), "folder", or "other".
    """

    kind: str
    records: list[Any] = field(default_factory=list)
    fields: dict[str, list[Any]] = field(default_factory=dict)

    def has_record_with(self, *names: str) -> bool:
        """Whether one of the first records is an object that has all these fields."""
        return any(isinstance(record, dict) and all(name in record for name in names) for record in self.records)


class JsonFile:
    """A window that moves over one file of JSON; a context manager.

    Raises:
        DataError: not JSON in UTF-8, naming the file and the place.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.size = path.stat().st_size
            self._bytes: BinaryIO = open(path, "rb")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        self._stream = io.TextIOWrapper(self._bytes, encoding="utf-8-sig", newline="")
        self._window = ""
        self._place = 0  # in the window
        self._before = 0  # characters that have left the window
        self._is_whole = False  # the window reaches the end of the file

    def __enter__(self) -> "JsonFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    @property
    def done(self) -> int:
        """Bytes read so far."""
        return self._bytes.tell()

    def peek(self) -> str:
        """The next character that is no white space, or "" at the end."""
        while True:
            while self._place < len(self._window):
                if self._window[self._place] not in _SPACE:
                    return self._window[self._place]
                self._place += 1
            if self._is_whole:
                return ""
            self._grow()

    def take(self, expected: str) -> str:
        """The next character, which must be one of `expected`."""
        found = self.peek()
        if not found or found not in expected:
            wanted = " or ".join(repr(character) for character in expected)
            raise self._error(f"{found!r} where {wanted} was expected" if found else "the file ends too early")
        self._place += 1
        return found

    def value(self) -> Any:
        """The next value, whole."""
        if not self.peek():
            raise self._error("the file ends too early")
        while True:
            try:
                value, end = _DECODER.raw_decode(self._window, self._place)
            except json.JSONDecodeError as error:
                if self._is_whole or len(self._window) - self._place > MAX_RECORD:
                    raise self._error(error.msg, at=error.pos) from None
                self._grow()
                continue
            except RecursionError:
                raise self._error("nested too deeply") from None
            except ValueError as error:  # a number of thousands of digits
                raise self._error(str(error)) from None
            # 12|34, 1.|5, 1e+|5: a number at the end of the window may go on.
            if isinstance(value, (int, float)) and end + 3 >= len(self._window) and not self._is_whole:
                self._grow()
                continue
            self._place = end
            return value

    def elements(self) -> Iterator[Any]:
        """The values of the array that comes next."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def fields(self) -> Iterator[str]:
        """The keys of the object that comes next; the caller takes each value before the next key."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            if self.peek() != '"':
                raise self._error("a key was expected")
            key = self.value()
            self.take(":")
            yield key
            if self.take(",}") == "}":
                return

    def skip(self) -> None:
        """Pass over the next value; an array element by element."""
        if self.peek() == "[":
            for _ in self.elements():
                pass
        else:
            self.value()

    def end(self) -> None:
        """Nothing may follow."""
        if self.peek():
            raise self._error("more follows after the end")

    def _grow(self) -> None:
        kept = len(self._window) - self._place
        try:
            more = self._stream.read(max(CHUNK, kept))  # doubling, so that a long record is not decoded too often
        except UnicodeDecodeError as error:
            raise self._error(f"not UTF-8: {error.reason}") from None
        self._before += self._place
        self._window = self._window[self._place :] + more
        self._place = 0
        self._is_whole = not more

    def _error(self, reason: str, *, at: int | None = None) -> DataError:
        place = self._before + (self._place if at is None else at)
        return DataError(f"{self.path}: not valid JSON at character {place}: {reason}")


def read_array(path: Path, field: str | None = None) -> Iterator[Element]:
    """Elements of the array that is the file, or that is the file's top-level field `field`.

    Raises:
        DataError: no such array, or not JSON.
    """
    with JsonFile(path) as file:
        if field is None:
            yield from _numbered(file)
            file.end()
            return
        is_there = False
        for key in file.fields():
            if key == field and not is_there:
                is_there = True
                yield from _numbered(file)
            else:
                file.skip()
        file.end()
    if not is_there:
        raise DataError(f"{path}: has no field {field!r}")


def read_field(path: Path, field: str) -> Any:
    """The top-level field `field`; None where there is none."""
    with JsonFile(path) as file:
        for key in file.fields():
            if key == field:
                return file.value()
            file.skip()
    return None


def read_lines(path: Path) -> Iterator[Element]:
    """The values of a file with one on each line; a line that is none has a `problem`."""
    size, number = path.stat().st_size, -1  # numbers count blank lines too, so that they are the lines'
    with open(path, "rb") as stream:
        while line := stream.readline(MAX_RECORD + 1):
            number += 1
            done, problem, value = stream.tell(), None, None
            if len(line) > MAX_RECORD:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(MAX_RECORD)
                problem = f"is longer than {MAX_RECORD} bytes"
            elif not line.strip():
                continue
            else:
                try:
                    value = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    problem = f"not valid JSON: {error or 'nested too deeply'}"
            yield Element(number, value, done, size, problem)


def read_records(path: Path) -> Iterator[Element]:
    """An array, or one record on each line."""
    return read_lines(path) if head_of(path).kind == "lines" else read_array(path)


def head_of(path: Path) -> Head:
    """What kind of file (or folder) this is.

    Raises:
        DataError: it begins like JSON and is broken.
    """
    if path.is_dir():
        return Head("folder")
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return Head("lines", [element.value for element in islice(read_lines(path), HEAD)])
    with JsonFile(path) as file:
        first = file.peek()
        if first == "[":
            return Head("array", list(islice(file.elements(), HEAD)))
        if first != "{":
            return Head("other")
        fields = {key: _first_elements(file) for key in file.fields()}
        if not file.peek():
            return Head("object", fields=fields)
    return Head("lines", [element.value for element in islice(read_lines(path), HEAD)])


def _first_elements(file: JsonFile) -> list[Any]:
    if file.peek() != "[":
        return [file.value()]
    kept: list[Any] = []
    for value in file.elements():
        if len(kept) < HEAD:
            kept.append(value)
    return kept


def _numbered(file: JsonFile) -> Iterator[Element]:
    for number, value in enumerate(file.elements()):
        yield Element(number, value, file.done, file.size)
