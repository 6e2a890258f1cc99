"""Characters of the game "Battle for Wesnoth" in the poses of their animations, where the game is installed."""

from pathlib import Path

from samtrain.core.errors import DataError
from samtrain.data.mini.stories.installed import INSTALL, find_source, searched
from samtrain.data.mini.stories.stock import team_colours
from samtrain.data.mini.stories.units import UnitTypes
from samtrain.data.mini.stories.wml import FileTree, Node, Reader
from samtrain.data.mini.vocabulary import stable_fraction
from samtrain.data.mmlink.options import SpritesOptions
from samtrain.data.mmlink.records import OBJECT, SourcePicture, with_article
from samtrain.data.mmlink.sources.listing import Listing, Progress, credit, file_locator

_IMAGES = "core/images"
_MIN_POSES = 2


def collect(options: SpritesOptions, *, where: str, cache: Path, progress: Progress) -> Listing:
    """Raises DataError where the game is required and not there."""
    try:
        source = find_source(options.path)
    except DataError:
        raise DataError(f"{where}.path: {options.path} holds no data of the game; {INSTALL}") from None
    if source is None:
        note = f"the game is not installed (searched {searched()}); {INSTALL}"
        if options.required:
            raise DataError(f"{where} (sprites): {note}")
        return Listing("sprites", note=note)
    tree = FileTree(source.data)
    core = Reader(tree, symbols=frozenset({"NORMAL"}))
    core.include("core/macros")
    units = core.with_symbols()
    units.include("core/units.cfg")
    types = UnitTypes(document.root for document in units.documents)
    listing = Listing("sprites", skipped=dict(core.skipped | units.skipped))
    listing.credits.append(
        credit(
            source="wesnoth",
            title="Battle for Wesnoth",
            author="the Battle for Wesnoth project and contributors",
            licence="GPL-2.0-or-later",
            homepage="https://www.wesnoth.org",
            licence_url="https://www.gnu.org/licenses/old-licenses/gpl-2.0.html",
            version=source.version,
        )
    )
    names = sorted(
        {node.values["id"] for document in units.documents for node in document.root.walk() if _is_unit(node)},
        key=lambda name: (stable_fraction("mmlink sprites", name), name),
    )
    colours, no_colours = team_colours(tree)
    listing.skipped |= no_colours
    taken: set[str] = set()
    for name in names:
        if options.max_identities is not None and len(taken) >= options.max_identities:
            break
        look = types.look(name)
        found = [(pose, tree.find(f"{_IMAGES}/{pose}")) for pose in look.poses] if look else []
        poses = [(pose, path) for pose, path in found if path is not None and path.is_file()]
        if look is None or len(poses) < _MIN_POSES or look.name.lower() in taken:
            continue
        taken.add(look.name.lower())
        army = int(stable_fraction("mmlink army", name) * len(colours["ranges"]))  # one for all poses of a unit
        team = {"palette": colours["palette"], "range": colours["ranges"][army]} if colours["ranges"] else None
        for pose, path in _spread(poses, options.max_poses):
            listing.pictures.append(
                SourcePicture(
                    id=f"sprites/{pose}",
                    role=OBJECT,
                    identity=f"sprites/{name}",
                    pose=Path(pose).stem,
                    name=with_article(look.name.lower()),
                    category="character",
                    caption="",
                    source="wesnoth",
                    locator=file_locator(path),
                    facts={"team": team},
                )
            )
    listing.pictures = list({picture.id: picture for picture in reversed(listing.pictures)}.values())[::-1]
    return listing


def _spread(poses: list[tuple[str, Path]], most: int | None) -> list[tuple[str, Path]]:
    """At most `most`, the first and the last among them."""
    if most is None or len(poses) <= most:
        return poses
    return [poses[round(i * (len(poses) - 1) / (most - 1))] for i in range(most)]


def _is_unit(node: Node) -> bool:
    return node.tag == "unit_type" and bool(node.values.get("id")) and node.values.get("do_not_list", "no") != "yes"
