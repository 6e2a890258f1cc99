"""Part 3 of mmlink-mini: stories from the campaigns of the game "Battle for Wesnoth", where it is installed.

installed (where the game is) -> wml (its markup) -> units (who is drawn how) and campaigns (who says what) -> stock
(windows, sprites and landscapes by split) -> samples. `part` puts them together.
"""

from samtrain.data.mini.stories.part import StoryPart, find_stories, note_on_reuse, prepare_stories
from samtrain.data.mini.stories.samples import StoryMaker
from samtrain.data.mini.stories.stock import STORY_SPLITS

__all__ = ["STORY_SPLITS", "StoryMaker", "StoryPart", "find_stories", "note_on_reuse", "prepare_stories"]
