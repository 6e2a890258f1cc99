"""Backgrounds: photographs and landscapes. What each shows is said by this table, by metadata, or by its file name."""

import json
from pathlib import Path
from typing import Any

from samtrain.core.errors import DataError
from samtrain.data.mini.stories.installed import find_source
from samtrain.data.mmlink.options import PhotographsOptions
from samtrain.data.mmlink.records import BACKGROUND, SourcePicture
from samtrain.data.mmlink.sources.listing import (
    Listing,
    Progress,
    credit,
    existing_folder,
    file_locator,
    picture_files,
    words_of,
)

WALLPAPERS = Path("/usr/share/wallpapers")
TEMPLATES = Path("/usr/share/tuxpaint/templates")
INSTALL = (
    "`apt-get install --no-install-recommends plasma-workspace-wallpapers tuxpaint-data` installs some on Debian; "
    "`paths` names folders of your own"
)
_MAX_WIDTH = 2600  # of a wallpaper that comes in several sizes, the largest below this
# What they show, looked at one by one; "" leaves a picture out (it shows a thing, or nothing that can be named).
_SHOWS: dict[str, str] = {
    "Altai": "blue mountains by a lake",
    "Autumn": "a meadow with an autumn tree",
    "BytheWater": "a wooden jetty by the water",
    "Canopee": "",
    "Cascade": "",
    "Cluster": "",
    "ColdRipple": "a jetty in the mist",
    "ColorfulCups": "",
    "DarkestHour": "a dark lake in the mist",
    "Elarun": "",
    "EveningGlow": "a lake shore in the evening",
    "FallenLeaf": "a ground covered with autumn leaves",
    "Flow": "",
    "FlyingKonqui": "",
    "Grey": "a curved modern facade",
    "Honeywave": "",
    "IceCold": "blue ice",
    "Kay": "",
    "Kite": "a blue sky with a few clouds",
    "Kokkini": "",
    "MilkyWay": "",
    "OneStandsOut": "green plants on dark soil",
    "Opal": "",
    "PastelHills": "pastel hills",
    "Patak": "",
    "Path": "a path through a forest",
    "SafeLanding": "",
    "Shell": "",
    "Volna": "a sandy beach with waves",
    "summer_1am": "a calm sea at dusk",
    "burnt_bark": "burnt bark",
    "cliff": "a rocky cliff",
    "corn_maze": "a path through tall corn",
    "jellyfish": "",
    "lighthouse": "",
    "mossy_bark": "mossy bark",
    "mossy_log": "a mossy forest floor",
    "mudstone": "grey rocks",
    "ocean_splash": "the spray of the sea",
    "ocean_waves": "waves on a beach",
    "redwoods_above": "tall redwoods seen from below",
    "rocks": "a beach of pebbles",
    "sheep": "a wide meadow under a blue sky",
    "spiders_web": "",
    "sun_behind_clouds": "clouds before the sun",
    "sun_behind_leaves": "green leaves in the light",
    "trees_above": "treetops seen from below",
    "trees_at_dusk": "bare trees at dusk",
    "wool_mill_machine": "the wheels of an old machine",
    "grim-altar": "",
    "landscape-battlefield": "",
    "landscape-battlefield_nohumans": "a painted battlefield",
    "landscape-bridge": "a painted bridge over a gorge",
    "landscape-bridge_sun": "a painted bridge in the sun",
    "landscape-castle": "a painted castle on a hill",
    "landscape-coast": "",
    "landscape-hills-01": "painted green hills",
    "landscape-hills-02": "",
    "landscape-mountains-01": "painted mountains",
    "landscape-mountains-02": "painted snowy mountains",
    "landscape-mountains-03": "a painted mountain pass",
    "landscape-mountains-04": "painted mountains in the mist",
    "landscape-mountains-05": "a painted mountain valley",
    "landscape-plain": "a painted plain",
    "swamp-01": "a painted swamp",
    "swamp-02": "a painted swamp",
    "swamp-03": "a painted swamp",
}


def collect(options: PhotographsOptions, *, where: str, cache: Path, progress: Progress) -> Listing:
    """Raises DataError where photographs are required, or folders named, and there are none."""
    if options.paths is not None:
        folders = [existing_folder(path, where=f"{where}.paths") for path in options.paths]
    else:
        folders = [folder for folder in (WALLPAPERS, TEMPLATES) if folder.is_dir()]
        game = find_source(None)
        folders += [game.data / "core" / "images" / "story"] if game else []
    listing = Listing("photographs")
    for folder in folders:
        for path, name in _backgrounds(folder):
            shows = _SHOWS.get(name, words_of(name))
            if not shows:
                listing.skipped[str(path.relative_to(folder))] = "shows a thing, or nothing that can be named"
                continue
            listing.pictures.append(
                SourcePicture(
                    id=f"photographs/{folder.name}/{name}",
                    role=BACKGROUND,
                    identity=f"photographs/{shows}",
                    pose=name,
                    name=shows,
                    category="background",
                    caption="",
                    source=f"photographs/{folder.name}/{name}",
                    locator=file_locator(path),
                )
            )
            listing.credits.append(_credit(folder, name))
    if not listing.pictures:
        note = f"no photographs in {', '.join(map(str, folders)) or 'the usual places'}; {INSTALL}"
        if options.required or options.paths is not None:
            raise DataError(f"{where} (photographs): {note}")
        listing.note = note
    return listing


def _backgrounds(folder: Path) -> list[tuple[Path, str]]:
    """(file, name) of each picture; of a wallpaper in several sizes, one."""
    found: dict[str, list[Path]] = {}
    for path in picture_files(folder):
        parts = path.relative_to(folder).parts
        is_wallpaper = len(parts) == 4 and parts[1:3] == ("contents", "images")
        if is_wallpaper or "contents" not in parts:
            found.setdefault(parts[0] if is_wallpaper else path.stem, []).append(path)
    return [(max(paths, key=_size_of), name) for name, paths in sorted(found.items())]


def _size_of(path: Path) -> tuple[bool, bool, int, str]:
    """Preferred: wide rather than high, not wider than needed, large. Sizes are file names, as "2560x1600.jpg"."""
    width, _, height = path.stem.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        return (False, False, 0, path.name)
    fits = int(width) <= _MAX_WIDTH
    return (int(width) >= int(height), fits, int(width) if fits else -int(width), path.name)


def _credit(folder: Path, name: str) -> dict[str, Any]:
    author, licence, title = "(see the package it was installed from)", "(see the package)", name
    try:
        about = json.loads((folder / name / "metadata.json").read_text())["KPlugin"]
        author = ", ".join(str(person["Name"])[:100] for person in about["Authors"])
        licence, title = str(about["License"])[:100], str(about["Name"])[:100]
    except (OSError, ValueError, KeyError, TypeError):
        if folder.name == "templates":
            author, licence = "Tux Paint's contributors", "GPL-2.0-or-later"
        elif folder.name == "story":
            author, licence = "the Battle for Wesnoth project and contributors", "GPL-2.0-or-later"
    return credit(source=f"photographs/{folder.name}/{name}", title=title, author=author, licence=licence)
