"""Open emoji sets: the same thing drawn in several styles is one identity in several poses; and icons.

The drawings, their names and kinds are mmlink-mini's.
"""

import zipfile
from pathlib import Path

from samtrain.data import parallel
from samtrain.data.mini import sources
from samtrain.data.mini.art import Stock, render_stock
from samtrain.data.mini.catalog import build_catalog
from samtrain.data.mini.vocabulary import is_plural, phrase, slug
from samtrain.data.mmlink.options import EmojiOptions
from samtrain.data.mmlink.records import ICON, OBJECT, Locator, SourcePicture
from samtrain.data.mmlink.sources.listing import Listing, Progress


def collect(options: EmojiOptions, *, where: str, cache: Path, progress: Progress) -> Listing:
    """Fetches and renders the drawings where the cache does not hold them."""
    path = render_stock(cache, num_workers=parallel.available_cores(), progress=progress)
    with zipfile.ZipFile(path) as archive:
        checksums = {info.filename: f"{info.CRC:08x}-{info.file_size}" for info in archive.infolist()}
    listing = Listing("emoji", credits=sources.attribution(cache))
    for identity in build_catalog(Stock(path), max_identities=options.max_identities):
        for style in identity.styles:
            member = f"{style}/{slug(identity.label)}.png"
            for role in [OBJECT] * options.objects + [ICON] * options.icons:
                listing.pictures.append(
                    SourcePicture(
                        id=f"emoji-{role}/{style}/{slug(identity.label)}",
                        role=role,
                        identity=f"emoji/{slug(identity.label)}",
                        pose=style,
                        name=phrase(identity.label),
                        category=identity.kind.name or identity.kind.task,
                        caption="",
                        source=style,
                        # The stock's own name holds a digest of all it was made from; its folder does not matter.
                        locator=Locator("zip", str(path), member, f"{path.name}-{checksums[member]}"),
                        facts={"plural": is_plural(identity.label)},
                    )
                )
    return listing
