"""mmlink-mini: real pictures and text in MmLINK's form, built anywhere in minutes.

sources (pinned npm tarballs) -> art (rendered drawings) -> catalog (who plays which role) -> plans (what a sample shows
and asks) -> compose (pixels, masks, boxes) and texts -> samples -> build (shards, report, attribution).
"""

from samtrain.data.mini.build import build_mini

__all__ = ["build_mini"]
