"""Stories as a part of a build: found or not, told or not, and in the end reported and credited."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samtrain.core.errors import DataError
from samtrain.data.mini.stories.campaigns import WINDOW, Library, read_library
from samtrain.data.mini.stories.installed import INSTALL, StorySource, find_source, searched
from samtrain.data.mini.stories.samples import LICENCE
from samtrain.data.mini.stories.stock import TRAIN, Progress, StoryFacts, UnusableStories, write_stock
from samtrain.data.mini.stories.wml import FileTree, WmlError
from samtrain.data.options import MiniOptions

_LISTED = 50  # skipped files that a report names; it counts all
_LICENCE_FILE = "COPYING.txt"
_HOMEPAGE = "https://www.wesnoth.org"
_LICENCE_URL = "https://www.gnu.org/licenses/old-licenses/gpl-2.0.html"
_CHANGES = (
    "lines cut to windows of three, without markup; sprites put in team colours, scaled, mirrored, and placed on parts "
    "of landscapes"
)


@dataclass(frozen=True)
class StoryPart:
    """What a build makes of stories. counts: samples of each split; empty, without a stock, where none are told."""

    report: dict[str, Any]
    stock: Path | None = None
    counts: dict[str, int] = field(default_factory=dict)
    credits: list[dict[str, Any]] = field(default_factory=list)
    licence_text: str = ""


def find_stories(options: MiniOptions) -> StorySource | None:
    """The installed game, or None where the set is to be built without stories.

    Raises:
        DataError: it is required, or a folder was named for it, and it is not there.
    """
    if options.stories == "never":
        if options.story_sources is not None:
            raise DataError(
                'data.mini.story_sources names a folder, but data.mini.stories is "never"; drop one of them'
            )
        return None
    source = find_source(options.story_sources)
    if source is None and options.stories == "required":
        raise DataError(f'data.mini.stories is "required": {_not_installed()}')
    return source


def prepare_stories(source: StorySource | None, path: Path, options: MiniOptions, *, progress: Progress) -> StoryPart:
    """Read the game and write the stock of its stories to `path`; says why where there are none.

    Raises:
        DataError: stories are required, or a folder was named for them, and none can be told.
    """
    if source is None:
        reason = 'data.mini.stories is "never"' if options.stories == "never" else _not_installed()
        return StoryPart({"built": False, "reason": reason})
    tree = FileTree(source.data)
    progress("reading stories", 0, 1)
    library = read_library(tree)
    progress("reading stories", 1, 1)
    try:
        facts = write_stock(path, tree, library, progress=progress)
    except UnusableStories as error:
        reason = f"{source.data}: {error}; {INSTALL}"
        if options.stories == "required" or options.story_sources is not None:
            raise DataError(f"stories cannot be built from {reason}") from None
        return StoryPart({"built": False, "reason": reason, "skipped": _listed(library.skipped)})
    limits = {split: options.num_train if split == TRAIN else options.num_eval for split in facts.windows}
    try:
        licence_text = tree.read(_LICENCE_FILE)
    except WmlError:
        licence_text = ""
    return StoryPart(
        report=_report(source, library, facts),
        stock=path,
        counts={split: min(limits[split], count) for split, count in facts.windows.items() if count},
        credits=_credits(source, library, facts),
        licence_text=licence_text,
    )


def note_on_reuse(report: dict[str, Any], options: MiniOptions, *, folder: Path) -> None:
    """Compare stories asked for with those of a finished set; where they could be added now, its report says so.

    Raises:
        DataError: stories are required, or a folder was named for them, and the set has none.
    """
    part = report["parts"]["stories"]
    source = None if part["built"] else find_stories(options)
    if source is None:
        return
    if options.stories == "required" or options.story_sources is not None:
        raise DataError(
            f"{folder}: was built without stories ({part.get('reason')}); choose another folder, or delete this one"
        )
    part["reason"] += f". Their sources are in {source.data} now: delete {folder} to have it built anew with them"


def _not_installed() -> str:
    return f"the sources of stories are not installed (searched {searched()}); {INSTALL}"


def _report(source: StorySource, library: Library, facts: StoryFacts) -> dict[str, Any]:
    messages: Counter[str] = Counter()
    for campaign in library.campaigns:
        messages += campaign.lines
    return {
        "built": True,
        "source": {"folder": str(source.data), "version": source.version or "unknown", "digest": facts.digest},
        "licence": LICENCE,
        "windows": facts.windows,
        "lines_per_window": WINDOW,
        "campaigns": facts.campaigns,
        "campaigns_not_installed": source.missing_packages(),
        "landscapes": {role: [Path(name).stem for name in names] for role, names in facts.landscapes.items()},
        "messages": dict(sorted(messages.items())),
        "sprites": facts.num_sprites,
        "files_read": sum(campaign.num_files for campaign in library.campaigns),
        "skipped": _listed(facts.skipped),
    }


def _listed(skipped: dict[str, str]) -> dict[str, Any]:
    return {"count": len(skipped), "files": dict(sorted(skipped.items())[:_LISTED])}


def _credits(source: StorySource, library: Library, facts: StoryFacts) -> list[dict[str, Any]]:
    told = {campaign for campaigns in facts.campaigns.values() for campaign in campaigns}
    common = {
        "style": "",
        "version": source.version or "unknown",
        "integrity": f"sha256-{facts.digest}",
        "homepage": _HOMEPAGE,
        "licence": LICENCE,
        "licence_url": _LICENCE_URL,
        "changes": _CHANGES,
    }
    core = {
        "package": f"wesnoth-{source.version}-data" if source.version else "wesnoth",
        "title": "Battle for Wesnoth: sprites and landscapes",
        "author": "the contributors of the Battle for Wesnoth Project",
    }
    rows = [common | core]
    for campaign in library.campaigns:
        if campaign.id in told:
            names = ", ".join(campaign.authors) or "the contributors of the Battle for Wesnoth Project"
            title = f"{campaign.name} (campaign): dialogue, sprites"
            rows.append(common | {"package": source.package(campaign.folder), "title": title, "author": names})
    return rows
