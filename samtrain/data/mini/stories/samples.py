"""One story sample: three lines, each with a picture of who says it, in some pose, somewhere outdoors.

The first two lines are the captions that are given; the third, as its author wrote it, is the answer. A picture may
show the others of the conversation too, smaller, behind the speaker.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from samtrain.core.seeds import derive_seed
from samtrain.data.mini import texts
from samtrain.data.mini.compose import SIZE, Corner, Picture, finished, merged_mask, opaque, overlap, visible_boxes
from samtrain.data.mini.stories.campaigns import Speaker, Window
from samtrain.data.mini.stories.stock import STORY_SPLITS, StoryStock

TASK = "storytelling"
LICENCE = "GPL-2.0-or-later"
_WITH_LISTENER = 0.5  # share of pictures, for each other character of the window
_MAX_SIDE = 150
_ATTEMPTS = 200


class StoryMaker:
    """Makes any story sample. Deterministic in (stock, seed, split, index)."""

    def __init__(self, stock_path: Path, *, seed: int) -> None:
        self.stock = StoryStock(stock_path)
        self.seed = seed
        # A limited split shows something of every campaign: its windows come in a random order.
        self.windows = {split: self._shuffled(split) for split in STORY_SPLITS}

    def __call__(self, split: str, index: int) -> dict[str, Any]:
        """The keyword arguments of `ShardWriter.write`."""
        rng = np.random.default_rng(derive_seed("mmlink-mini", self.seed, split, index))
        window = self.windows[split][index]
        pictures = [self._picture(window, i, split, rng) for i in range(len(window.lines))]
        instruction, output = texts.story_texts(window.texts, form=int(rng.integers(840)))
        return {
            "key": f"{split}-{index:06d}",
            "task": TASK,
            "instruction": instruction,
            "output": output,
            "images": [picture.jpeg for picture in pictures],
            "source": "mmlink-mini",
            "meta": {
                "split": split,
                "part": "story",
                "licence": LICENCE,
                "campaign": window.campaign,
                "scenario": window.scenario,
                "story": window.story,
                "speakers": [line.speaker.name for line in window.lines],
                "pictures": [{"objects": picture.objects, "background": picture.background} for picture in pictures],
            },
            "extra": {f"{i}.mask.png": picture.mask_png for i, picture in enumerate(pictures)},
        }

    def _shuffled(self, split: str) -> list[Window]:
        windows = self.stock.windows[split]
        order = np.random.default_rng(derive_seed("mmlink-mini", self.seed, split)).permutation(len(windows))
        return [windows[position] for position in order]

    def _picture(self, window: Window, number: int, split: str, rng: np.random.Generator) -> Picture:
        """The speaker of that line in front; the first in `objects`."""
        speaker = window.lines[number].speaker
        others = {line.speaker.id: line.speaker for line in window.lines if line.speaker.id != speaker.id}
        shown = [speaker, *(other for other in others.values() if rng.random() < _WITH_LISTENER)]
        names = [character.sprites[int(rng.integers(len(character.sprites)))] for character in shown]
        for attempt in range(_ATTEMPTS):
            shrink = 0.97 ** (attempt // 5)
            sprites = [
                self._sprite(character, name, shrink, i == 0, rng)
                for i, (character, name) in enumerate(zip(shown, names))
            ]
            outlines = [opaque(sprite) for sprite in sprites]
            corners = _stand(sprites, rng)
            if corners is None:
                continue
            order = np.arange(len(shown))[::-1]  # the speaker hides the others
            mask = merged_mask(outlines, corners, order)
            visible = visible_boxes(outlines, mask)
            if visible is not None:
                break
        else:
            raise AssertionError(f"no layout for {names} in {_ATTEMPTS} attempts")
        rows: list[dict[str, Any]] = [
            {
                "identity": character.id,
                "name": character.name,
                "kind": character.unit_type,
                "style": "wesnoth",
                "pose": Path(name).stem,
                "part": "speaker" if i == 0 else "listener",
                "box": box,
                "visible": fraction,
                "value": i + 1,
            }
            for i, (character, name, (box, fraction)) in enumerate(zip(shown, names, visible))
        ]
        canvas, background = self._landscape(split, rng)
        return finished(canvas, sprites, corners, order, mask, rows, background)

    def _sprite(
        self, character: Speaker, name: str, shrink: float, is_speaker: bool, rng: np.random.Generator
    ) -> Image.Image:
        """Enlarged: sprites are drawn about 50 pixels high. Cropped to its opaque pixels, perhaps mirrored."""
        sprite = self.stock.sprite(name, character.side)
        scale = shrink * (rng.uniform(1.8, 2.4) if is_speaker else rng.uniform(1.1, 1.4))
        scale = min(scale, _MAX_SIDE / max(sprite.size))
        sprite = sprite.resize(
            (max(1, round(scale * sprite.width)), max(1, round(scale * sprite.height))), Image.Resampling.BICUBIC
        )
        if rng.random() < 0.5:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return sprite.crop(opaque(sprite).getbbox())

    def _landscape(self, split: str, rng: np.random.Generator) -> tuple[Image.Image, str]:
        """A square out of a landscape of training or of test."""
        names = self.stock.landscapes["test" if split.startswith("test") else "train"]
        name = names[int(rng.integers(len(names)))]
        landscape = self.stock.landscape(name)
        side = min(landscape.width, landscape.height, int(rng.integers(SIZE, landscape.height + 1)))
        left = int(rng.integers(landscape.width - side + 1))
        top = int(rng.integers(landscape.height - side + 1))
        square = landscape.crop((left, top, left + side, top + side))
        return square.resize((SIZE, SIZE), Image.Resampling.BICUBIC), Path(name).stem


def _stand(sprites: list[Image.Image], rng: np.random.Generator) -> list[Corner] | None:
    """Corners that put everybody on the ground, the first nearest; None where they would hide each other."""
    corners: list[Corner] = []
    for i, sprite in enumerate(sprites):
        for _ in range(12):
            feet = rng.integers(180, SIZE - 3) if i == 0 else rng.integers(135, 175)
            left = int(rng.integers(2, SIZE - 2 - sprite.width))
            corner = (left, max(2, int(feet) - sprite.height))
            if all(overlap(sprite, corner, *other) <= 0.1 for other in zip(sprites, corners)):
                corners.append(corner)
                break
        else:
            return None
    return corners
