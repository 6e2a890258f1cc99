"""Where the story sources are: the data of the game "Battle for Wesnoth", installed by the system's package manager."""

import re
from dataclasses import dataclass
from pathlib import Path

from samtrain.core.errors import DataError

# Debian's place first, then the game's own default.
_PLACES = (
    Path("/usr/share/games/wesnoth"),
    Path("/usr/local/share/games/wesnoth"),
    Path("/usr/share/wesnoth"),
    Path("/usr/local/share/wesnoth"),
)
# Folder of a campaign -> what Debian calls its package, after "wesnoth-VERSION-".
CAMPAIGN_PACKAGES: dict[str, str] = {
    "Dead_Water": "dw",
    "Delfadors_Memoirs": "dm",
    "Descent_Into_Darkness": "did",
    "Eastern_Invasion": "ei",
    "Heir_To_The_Throne": "httt",
    "Legend_of_Wesmere": "low",
    "Liberty": "l",
    "Northern_Rebirth": "nr",
    "Sceptre_of_Fire": "sof",
    "Secrets_of_the_Ancients": "sota",
    "Son_Of_The_Black_Eye": "sotbe",
    "The_Hammer_of_Thursagan": "thot",
    "The_Rise_Of_Wesnoth": "trow",
    "The_South_Guard": "tsg",
    "Two_Brothers": "ttb",
    "Under_the_Burning_Suns": "utbs",
}
_DEBIAN_12 = "1.16"
INSTALL = (
    "`apt-get install --no-install-recommends wesnoth` installs them on Debian (the game with all campaigns, about "
    f"300 MB; Debian 12's packages are wesnoth-{_DEBIAN_12}-data and "
    f"{', '.join(f'wesnoth-{_DEBIAN_12}-{suffix}' for suffix in CAMPAIGN_PACKAGES.values())})"
)


@dataclass(frozen=True)
class StorySource:
    """An installed game. data: its `data` folder. version: as the folder is named ("1.16"), or "" where it is not."""

    data: Path
    version: str

    def package(self, campaign_folder: str) -> str:
        """The name of the Debian package that a campaign comes from; "wesnoth" where it is not known."""
        suffix = CAMPAIGN_PACKAGES.get(Path(campaign_folder).name)
        return f"wesnoth-{self.version}-{suffix}" if suffix and self.version else "wesnoth"

    def missing_packages(self) -> list[str]:
        """Debian packages of the campaigns that are not installed."""
        missing = [folder for folder in CAMPAIGN_PACKAGES if not (self.data / "campaigns" / folder).is_dir()]
        return sorted({self.package(folder) for folder in missing})


def find_source(folder: str | Path | None) -> StorySource | None:
    """The game in `folder` (it, a version of it, or its data), or in one of the usual places; None where it is not.

    Raises:
        DataError: `folder` was given and does not hold the game's data.
    """
    if folder is None:
        return next((found for place in _PLACES if (found := _source_in(place))), None)
    found = _source_in(Path(folder).expanduser())
    if found is None:
        raise DataError(
            f"data.mini.story_sources: {folder} holds no data of Battle for Wesnoth (no core/units.cfg and campaigns/ "
            f"in it, in its data/, or in VERSION/data/); {INSTALL}"
        )
    return found


def searched() -> str:
    """The places that are looked through, for messages."""
    return ", ".join(str(place) for place in _PLACES)


def _source_in(folder: Path) -> StorySource | None:
    """The newest version that lies there."""
    try:
        versions = [item for item in folder.iterdir() if _numbers(item.name)] if folder.is_dir() else []
    except OSError:
        return None
    versions.sort(key=lambda item: _numbers(item.name), reverse=True)
    for data in (folder, folder / "data", *(version / "data" for version in versions)):
        if (data / "core" / "units.cfg").is_file() and (data / "campaigns").is_dir():
            data = data.resolve()
            return StorySource(data, data.parent.name if _numbers(data.parent.name) else "")
    return None


def _numbers(name: str) -> tuple[int, ...]:
    """ "1.16" -> (1, 16); () for what is no version."""
    return tuple(int(part) for part in name.split(".")) if re.fullmatch(r"\d{1,4}(\.\d{1,4}){1,3}", name) else ()
