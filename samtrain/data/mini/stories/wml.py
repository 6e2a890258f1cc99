"""Reading WML, the markup that Wesnoth's campaigns are written in, as far as stories need it.

The preprocessor expands macros (`#define`, `{NAME argument}`), follows conditions and includes; the parser makes a
tree of tags and values of what is left. Every file is read on its own: one that is damaged is skipped, counted and
listed, and the others are read.

Files are untrusted. They are found below one root and nowhere else; size, number, depth and the text that macros grow
to are limited. Nothing is executed: Lua in the files stays text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

MAX_FILE_BYTES = 4_000_000  # the largest of the game's has 0.2 MB
MAX_EXPANDED_CHARS = 100_000_000  # of all files of a reader, counted at every level of macros
MAX_FILES = 20_000
_MAX_DEPTH = 60  # of macros and files in each other, and of tags

_QUOTED = re.compile(r'"([^"]*(?:""[^"]*)*)"')
_SPECIAL = re.compile(r'["{#]|<<')
_SPECIAL_IN_QUOTES = re.compile(r'["{]')
_DIRECTIVE = re.compile(r"#(define|undef|ifn?def|ifn?have|ifn?ver)\b[ \t]*([^\n]*)")
_CONDITION = re.compile(r"#(ifn?(?:def|have|ver)|else|endif)\b")
_TAG = re.compile(r"\[(/?)\+?([A-Za-z0-9_]+)\]")
_KEY = re.compile(r'([^\[\]=\n"]+)=')
_MARK = re.compile(r'[ \t\r]+|_[ \t]*(?="|<<)')  # `_` marks what the game translates
_SPACE = re.compile(r"\s*")
_UNQUOTED = re.compile(r'[^"\n]+')


class WmlError(ValueError):
    """A file that cannot be read as WML."""


@dataclass
class Node:
    """A tag with its own values (`key=value`) and children, in the order of the file."""

    tag: str
    values: dict[str, str] = field(default_factory=dict)
    children: list["Node"] = field(default_factory=list)

    def walk(self) -> Iterator["Node"]:
        """This node and all below it, in the order of the file."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(reversed(node.children))

    def first(self, tag: str) -> "Node | None":
        """The first child of that tag."""
        return next((child for child in self.children if child.tag == tag), None)


@dataclass(frozen=True)
class Document:
    """What one file holds, below a nameless root."""

    path: str
    root: Node


class FileTree:
    """Read access to one folder by relative name; no name leads out of it, neither by `..` nor by a link."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def find(self, name: str) -> Path | None:
        """The file or folder of that relative name, or None where there is none inside."""
        pure = PurePosixPath(name)
        if not name or "\0" in name or pure.is_absolute() or ".." in pure.parts:
            return None
        try:
            path = (self.root / pure).resolve()
            return path if path.is_relative_to(self.root) and path.exists() else None
        except (OSError, RuntimeError):  # a name too long; links in a circle
            return None

    def read(self, name: str) -> str:
        """The text of a file.

        Raises:
            WmlError: it is no plain file inside the tree, too large, or not UTF-8.
        """
        path = self.find(name)
        if path is None or not path.is_file():
            raise WmlError("no such file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise WmlError(f"{path.stat().st_size} bytes, more than {MAX_FILE_BYTES}")
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise WmlError(f"cannot be read: {error}") from None

    def names(self, folder: str, suffix: str) -> list[str]:
        """Relative names of a folder's own files with that suffix, sorted."""
        found = (name for name in self._inside(folder) if name.endswith(suffix))
        return sorted(name for name in found if (path := self.find(name)) and path.is_file())

    def folders(self, folder: str) -> list[str]:
        """Relative names of a folder's own folders, sorted."""
        return sorted(name for name in self._inside(folder) if (path := self.find(name)) and path.is_dir())

    def _inside(self, folder: str) -> list[str]:
        path = self.find(folder)
        try:
            return [f"{folder}/{item.name}" for item in path.iterdir()] if path is not None and path.is_dir() else []
        except OSError:  # not for us
            return []


@dataclass(frozen=True)
class _Macro:
    parameters: tuple[str, ...]
    defaults: dict[str, str]
    body: str


class Reader:
    """Reads files with one table of macros, as the game does.

    documents: what was read, in order. skipped: file -> why it was not.
    """

    def __init__(self, tree: FileTree, *, symbols: frozenset[str] = frozenset()) -> None:
        self.tree = tree
        self.macros: dict[str, _Macro] = {symbol: _Macro((), {}, "") for symbol in symbols}
        self.documents: list[Document] = []
        self.skipped: dict[str, str] = {}
        self._files: list[str] = []  # being read, outermost first
        self._depth = 0
        self._num_files = 0
        self._num_chars = 0

    def with_symbols(self, *symbols: str) -> "Reader":
        """A reader that knows this one's macros, and has read nothing yet."""
        other = Reader(self.tree, symbols=frozenset(symbols))
        other.macros = self.macros | other.macros
        return other

    def include(self, name: str) -> None:
        """Read a file, or a folder's files in the game's order."""
        path = self.tree.find(name)
        if path is None:
            self.skipped[name] = "no such file below the root"
        elif path.is_file():
            if path.suffix == ".cfg":  # the others are maps
                self._include_file(name)
        elif f"{name}/_main.cfg" in (files := self.tree.names(name, ".cfg")):
            self._include_file(f"{name}/_main.cfg")
        else:
            for file in sorted(files, key=_place_in_folder):
                self._include_file(file)
            for folder in self.tree.folders(name):
                if self.tree.find(f"{folder}/_main.cfg"):
                    self._include_file(f"{folder}/_main.cfg")

    def _include_file(self, name: str) -> None:
        if name in self._files:
            self.skipped[name] = "includes itself"
            return
        self._num_files += 1
        if self._num_files > MAX_FILES:
            self.skipped[name] = f"more than {MAX_FILES} files"
            return
        self._files.append(name)
        try:
            root = parse(self._expand(self.tree.read(name), {}))
            self.documents.append(Document(name, root))
        except WmlError as error:
            self.skipped[name] = str(error)
        finally:
            self._files.pop()

    def _expand(self, text: str, arguments: dict[str, str]) -> str:
        """`text` without comments and directives, its macros replaced.

        arguments: those of the macro whose body `text` is; they are expanded already.
        """
        if self._depth >= _MAX_DEPTH:
            raise WmlError("macros or files are nested too deeply")
        self._depth += 1
        try:
            expanded = self._expand_once(text, arguments)
        finally:
            self._depth -= 1
        self._num_chars += len(expanded) + 1  # one for itself: a macro that is called for ever may be empty
        if self._num_chars > MAX_EXPANDED_CHARS:
            raise WmlError(f"macros grow to more than {MAX_EXPANDED_CHARS} characters")
        return expanded

    def _expand_once(self, text: str, arguments: dict[str, str]) -> str:
        parts: list[str] = []
        position, quoted = 0, False
        while found := (_SPECIAL_IN_QUOTES if quoted else _SPECIAL).search(text, position):
            start = found.start()
            parts.append(text[position:start])
            if found[0] == '"':
                quoted = not quoted
                parts.append('"')
                position = start + 1
            elif found[0] == "{":
                end = _closing_brace(text, start)
                parts.append(self._call(text[start + 1 : end], arguments))
                position = end + 1
            elif found[0] == "<<":
                end = text.find(">>", start)
                if end < 0:
                    raise WmlError("`<<` without `>>`")
                parts.append(text[start : end + 2])
                position = end + 2
            else:
                position, chosen = self._directive(text, start)
                if chosen:
                    parts.append(self._expand(chosen, arguments))
        parts.append(text[position:])
        return "".join(parts)

    def _call(self, content: str, arguments: dict[str, str]) -> str:
        """What `{content}` stands for: a parameter, a macro's body, or nothing (a file is read beside this one)."""
        words = _split_arguments(content)
        if not words:
            return ""
        name = words[0]
        if name in arguments:
            return arguments[name]
        macro = self.macros.get(name)
        if macro is None:
            self._follow(self._expand(name, arguments))
            return ""
        given: list[str] = []
        values = {}
        for word in words[1:]:
            key, equals, value = word.partition("=")
            if equals and key in macro.defaults:
                values[key] = self._expand(value, arguments)
            else:
                given.append(self._expand(word, arguments))
        values |= dict(zip(macro.parameters, given))
        for key, default in macro.defaults.items():
            if key not in values:
                values[key] = self._expand(default, values)
        return self._expand(macro.body, values)

    def _follow(self, name: str) -> None:
        """Read the file or folder that `{name}` includes; a name that is neither leaves nothing, as in the game."""
        if name.startswith("./") and self._files:
            self.include(str(PurePosixPath(self._files[-1]).parent / name[2:]))
        elif not name.startswith("~") and ("/" in name or self.tree.find(name)):  # `~` is the player's own folder
            self.include(name.rstrip("/"))

    def _directive(self, text: str, start: int) -> tuple[int, str]:
        """Where reading goes on after the `#` at `start`, and the text of a condition's chosen branch."""
        end_of_line = text.find("\n", start)
        end_of_line = len(text) if end_of_line < 0 else end_of_line
        found = _DIRECTIVE.match(text, start)
        if found is None:
            return end_of_line, ""  # a comment
        kind, rest = found[1], found[2].split("#")[0].split()
        if kind == "define":
            end = text.find("#enddef", end_of_line)
            if end < 0 or not rest:
                raise WmlError("`#define` without a name or `#enddef`")
            body, defaults = _split_defaults(text[end_of_line + 1 : end])
            self.macros[rest[0]] = _Macro(tuple(rest[1:]), defaults, body)
            return end + len("#enddef"), ""
        if kind == "undef":
            self.macros.pop(rest[0] if rest else "", None)
            return end_of_line, ""
        first, second, end = _branches(text, found.end())
        is_true = self._is_true(kind, rest)
        return end, first if is_true else second

    def _is_true(self, kind: str, words: list[str]) -> bool:
        name = words[0] if words else ""
        if kind.endswith("def"):
            holds = name in self.macros
        elif kind.endswith("have"):
            holds = self.tree.find(name) is not None
        else:
            holds = True  # versions: the files ask for theirs or later
        return holds != kind.startswith("ifn")


def parse(text: str) -> Node:
    """The tree of preprocessed WML.

    Raises:
        WmlError: tags that do not match, a string without end, text that is neither tag nor value.
    """
    root = Node("")
    stack = [root]
    position = 0
    while (position := _skip_space(text, position)) < len(text):
        if tag := _TAG.match(text, position):
            if not tag[1]:
                node = Node(tag[2])
                stack[-1].children.append(node)
                stack.append(node)
                if len(stack) > _MAX_DEPTH:
                    raise WmlError("tags are nested too deeply")
            elif stack[-1].tag != tag[2] or len(stack) == 1:
                raise WmlError(f"[/{tag[2]}] closes [{stack[-1].tag}]")
            else:
                stack.pop()
            position = tag.end()
        elif key := _KEY.match(text, position):
            value, position = _parse_value(text, key.end())
            stack[-1].values[key[1].strip()] = value
        else:
            raise WmlError(f"neither a tag nor a value: {text[position : position + 40]!r}")
    if len(stack) > 1:
        raise WmlError(f"[{stack[-1].tag}] is not closed")
    return root


def _parse_value(text: str, position: int) -> tuple[str, int]:
    """A value that begins at `position`, and where the next thing begins. `+` joins strings, also over lines."""
    parts = []
    while position < len(text) and text[position] != "\n":
        if match := _MARK.match(text, position):
            position = match.end()
        elif text[position] == '"':
            match = _QUOTED.match(text, position)
            if match is None:
                raise WmlError("a string has no end")
            parts.append(match[1].replace('""', '"'))
            position = match.end()
        elif text[position] == "+" and parts:
            position = _skip_space(text, position + 1)
        elif text.startswith("<<", position):
            end = text.find(">>", position)
            if end < 0:
                raise WmlError("`<<` without `>>`")
            parts.append(text[position + 2 : end])
            position = end + 2
        else:
            match = _UNQUOTED.match(text, position)
            assert match is not None
            parts.append(match[0].strip())
            position = match.end()
    return "".join(parts), position


def _skip_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    assert found is not None
    return found.end()


def _place_in_folder(name: str) -> tuple[int, str]:
    base = PurePosixPath(name).name
    return {"_initial.cfg": 0, "_final.cfg": 2}.get(base, 1), name


def _closing_brace(text: str, start: int) -> int:
    """Where the brace at `start` is closed; braces in strings do not count."""
    depth, quoted = 0, False
    for found in re.compile(r'["{}]').finditer(text, start):
        if found[0] == '"':
            quoted = not quoted
        elif not quoted:
            depth += 1 if found[0] == "{" else -1
            if depth == 0:
                return found.start()
    raise WmlError("`{` without `}`")


def _split_arguments(content: str) -> list[str]:
    """A macro's name and arguments: divided by white space, except in strings, braces and parentheses."""
    words: list[str] = []
    current: list[str] = []
    braces = parentheses = 0
    quoted = False
    for character in content:
        if character == '"':
            quoted = not quoted
        elif not quoted and character in "{}":
            braces += 1 if character == "{" else -1
        elif not quoted and not braces:
            if character == "(" and (parentheses or not current):
                parentheses += 1
                if parentheses == 1:
                    continue
            elif character == ")" and parentheses:
                parentheses -= 1
                if not parentheses:
                    words.append("".join(current))  # `()` is an empty argument
                    current = []
                    continue
            elif character.isspace() and not parentheses:
                if current:
                    words.append("".join(current))
                    current = []
                continue
        current.append(character)
    if parentheses or quoted:
        raise WmlError(f"a macro's arguments have no end: {content[:40]!r}")
    return [*words, "".join(current)] if current else words


def _split_defaults(body: str) -> tuple[str, dict[str, str]]:
    """A macro's body without its optional parameters, and these with their defaults."""
    parts, defaults = [], {}
    position = 0
    while (start := body.find("#arg", position)) >= 0:
        end = body.find("#endarg", start)
        if end < 0:
            raise WmlError("`#arg` without `#endarg`")
        name, _, default = body[start + len("#arg") : end].partition("\n")
        defaults[name.strip()] = default.rstrip("\n")
        parts.append(body[position:start].rstrip(" \t"))
        position = end + len("#endarg")
    return "".join([*parts, body[position:]]), defaults


def _branches(text: str, start: int) -> tuple[str, str, int]:
    """The two branches of the condition whose first begins at `start`, and where reading goes on."""
    depth, first_end, second_start = 0, -1, -1
    for found in _CONDITION.finditer(text, start):
        if found[1] not in ("else", "endif"):
            depth += 1
        elif found[1] == "endif" and depth:
            depth -= 1
        elif found[1] == "else" and not depth and first_end < 0:
            first_end, second_start = found.start(), found.end()
        elif found[1] == "endif":
            if first_end < 0:
                return text[start : found.start()], "", found.end()
            return text[start:first_end], text[second_start : found.start()], found.end()
    raise WmlError("a condition has no `#endif`")
