"""NICO folders: `<set>/<class>/<context>/<picture>`, the set being `Animal` or `Vehicle`.

NICO has classes, no captions and no groups. Each sample here is a group of pictures of one class, taken from as many
contexts as there are; the question is what they share and the answer names the class. The grouping depends on the
seed and the file names alone, and uses every picture once. The authors' own annotations of these pictures are not
public; theirs come as an `annotations.json`.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from samtrain.core.errors import DataError
from samtrain.core.seeds import derive_seed
from samtrain.data.convert.base import Draft, Format, Record, Source, lay_out
from samtrain.data.convert.images import SUFFIXES, ImageFolder
from samtrain.data.convert.json_stream import Head
from samtrain.data.convert.options import ConvertOptions
from samtrain.data.convert.stories import choose, read_instructions

INSTRUCTIONS = (
    "What do all of these pictures have in common?",
    "Name the thing that every one of these pictures shows.",
    "Describe in one sentence what is common to these pictures.",
    "Which kind of thing appears in each picture?",
    "Say what these pictures share.",
    "Look at all pictures: what can be seen in every one of them?",
)


def sources(path: Path, options: ConvertOptions) -> list[Source]:
    """All sets below `path`, or the set that it is, as one split."""
    return [Source(path, options.split or "train", "", path)] if path.is_dir() and _sets(path) else []


def prepare(source: Source, options: ConvertOptions) -> Source:
    """The source with the instructions its groups choose from."""
    return replace(source, header=read_instructions(options.instructions, INSTRUCTIONS))


def fits(head: Head) -> bool:
    return head.kind == "folder"


def records(source: Source, options: ConvertOptions) -> Iterator[Record]:
    """Groups: (set, class, names of the pictures below the image folder)."""
    folder = ImageFolder(source.images, max_bytes=options.max_image_bytes, max_pixels=options.max_image_pixels)
    names = [(one, name) for one in _sets(source.path) for name in _files(one)]
    classes: dict[tuple[str, str], dict[str, list[str]]] = {}  # (set, class) -> context -> pictures
    number = 0
    for done, (one, name) in enumerate(names, start=1):
        below = (one / name).relative_to(source.path).as_posix()
        parts = name.split("/")
        problem = _problem(folder, below) if len(parts) == 3 else "does not lie in <class>/<context>/"
        if problem is None:
            classes.setdefault((one.absolute().name, parts[0]), {}).setdefault(parts[1], []).append(below)
        else:
            yield Record(number, below, None, done, len(names), problem)
            number += 1
    for (one_set, kind), pictures in classes.items():
        for group in groups(pictures, options.group_size, seed=derive_seed("nico", options.seed, one_set, kind)):
            problem = f"{group[0]} is the only picture of its class" if len(group) == 1 else None
            where = f"group {number} ({one_set}/{kind})"
            yield Record(number, where, (one_set, kind, group), len(names), len(names), problem)
            number += 1


def drafts(record: Record, source: Source, options: ConvertOptions, images: ImageFolder) -> list[Draft]:
    one, kind, names = record.value
    shown = kind.replace("_", " ")
    article = "an" if shown[0].lower() in "aeiou" else "a"
    instruction = choose(source.header, options, one, kind, *names)
    row = {"set": one, "class": kind}
    text = lay_out(instruction, len(names), options.layout)
    return [Draft(text, f"Each picture shows {article} {shown}.", list(names), row, task=one)]


def groups(pictures: dict[str, list[str]], size: int, *, seed: int) -> list[list[str]]:
    """Groups of about `size` pictures (none larger, none smaller by more than one), mixed over contexts.

    Args:
        pictures: context -> names.
    """
    draw = random.Random(seed)
    placed = []
    for context in sorted(pictures):
        names = sorted(pictures[context])
        draw.shuffle(names)
        # Evenly spread: the i-th of n names of a context stands at (i + 1/2) / n of the whole.
        placed += [((i + 0.5) / len(names), context, name) for i, name in enumerate(names)]
    order = [name for _, _, name in sorted(placed)]
    count = -(-len(order) // size)
    return [order[len(order) * i // count : len(order) * (i + 1) // count] for i in range(count)]


def _is_set(folder: Path) -> bool:
    """Whether pictures lie two folders below, class and context, and no records that would speak of them."""
    return not any(one for level in ("*.json*", "*/*.json*") for one in folder.glob(level)) and any(
        name.lower().endswith(SUFFIXES)
        for kind in _folders(folder)
        for context in _folders(kind)
        for name in os.listdir(context)
    )


def _folders(path: Path) -> list[Path]:
    """The sub-folders, links and hidden ones apart, in order."""
    return sorted(one for one in path.iterdir() if one.is_dir() and not one.is_symlink() and one.name[0] != ".")


def _sets(path: Path) -> list[Path]:
    return [path] if _is_set(path) else [folder for folder in _folders(path) if _is_set(folder)]


def _files(one: Path) -> Iterator[str]:
    """All files of a set, and links to folders, which are not followed; names below it, in order."""
    for folder, inside, names in os.walk(one):
        inside.sort()
        links = [name for name in inside if (Path(folder) / name).is_symlink()]
        for name in sorted([*names, *links]):
            yield (Path(folder) / name).relative_to(one).as_posix()


def _problem(folder: ImageFolder, name: str) -> str | None:
    try:
        folder.read(name)
    except DataError as error:
        return str(error)
    return None


FORMAT = Format(
    looks_like="NICO: folders <set>/<class>/<context>/ of pictures",
    sources=sources,
    prepare=prepare,
    fits=fits,
    records=records,
    drafts=drafts,
    fields=frozenset({"set", "class"}),
    uses=frozenset({"layout", "instructions", "group_size"}),
)
