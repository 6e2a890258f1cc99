"""The shapes of the benchmark: batches of image groups at InstructBLIP's sizes.

Legend: S samples (groups), N images of a sample, I images in the batch, P patches, C width of the vision features,
H heads, D head width, Q query tokens per image, L = Q + text tokens, K contexts: I with `others`, S with `all`.
"""

from dataclasses import dataclass, replace
from typing import Literal

Context = Literal["others", "all"]
CONTEXTS: tuple[Context, ...] = ("others", "all")

Level = Literal["mix", "op", "cross", "qformer"]
LEVELS: dict[Level, str] = {
    "mix": "adaptive adjustment: weights of the contextual images, once per step",
    "op": "the W stream's cross-attention of one layer, given what the layer has already",
    "cross": "both streams' cross-attention of one layer, key/value projection included",
    "qformer": "the whole two-stream Q-Former",
}


@dataclass(frozen=True)
class Shape:
    """A batch.

    counts: images of each sample. initial_layer, contextual_layer: l and k, 1-based; 12 and 12 are the released ones.
    """

    name: str
    counts: tuple[int, ...]
    patches: int = 257
    feature_width: int = 1408
    heads: int = 12
    head_dim: int = 64
    queries: int = 32
    text_tokens: int = 64
    layers: int = 12
    cross_frequency: int = 2
    intermediate: int = 3072
    initial_layer: int = 12
    contextual_layer: int = 12
    note: str = ""

    @property
    def images(self) -> int:
        """I."""
        return sum(self.counts)

    @property
    def groups(self) -> int:
        """S."""
        return len(self.counts)

    @property
    def most_images(self) -> int:
        """N of the largest sample."""
        return max(self.counts)

    @property
    def width(self) -> int:
        """H * D, the width of the Q-Former."""
        return self.heads * self.head_dim

    @property
    def length(self) -> int:
        """L, positions of a row of the Q-Former."""
        return self.queries + self.text_tokens

    def contexts(self, context: Context) -> int:
        """K."""
        return self.images if context == "others" else self.groups

    def slots(self, context: Context) -> int:
        """Places (context, image) of the mixing weights that exist, own images of `others` included."""
        return sum(n * n for n in self.counts) if context == "others" else self.images

    def describe(self) -> str:
        sizes = set(self.counts)
        groups = (
            f"{self.groups}x{self.counts[0]}" if len(sizes) == 1 else f"{self.groups} ragged ({self.images} images)"
        )
        return f"{self.name} {groups}, P {self.patches}"


# Drawn once: random.Random(13).randint(2, 10), 16 times. As many images as shape A within 10 %: the two compare.
RAGGED_COUNTS = (6, 6, 4, 5, 4, 5, 4, 4, 3, 10, 5, 6, 2, 8, 4, 2)

_ALL = (
    Shape("A", (5,) * 16, note="headline"),
    Shape("B", (2,) * 16),
    Shape("C", (10,) * 8, note="many images"),
    Shape("D", (2,), note="latency"),
    Shape("E", RAGGED_COUNTS, note="ragged, 2 to 10 images"),
    Shape("F", (5,) * 64, note="large batch"),
    Shape("G", (5,) * 16, patches=577, note="336 px features"),
)
SHAPES: dict[str, Shape] = {shape.name: shape for shape in _ALL}


# The figures' horizontal axis: 16 samples of so many images.
SWEEP = (2, 3, 5, 8, 10)


def sweep() -> tuple[Shape, ...]:
    return tuple(replace(SHAPES["A"], name=f"N{n}", counts=(n,) * 16, note="") for n in SWEEP)


def reduced(shape: Shape, *, max_groups: int = 3) -> Shape:
    """The same group structure at toy widths: what a CPU can check in a moment. Ragged shapes keep different counts."""
    kept = tuple(dict.fromkeys(shape.counts))[:max_groups]
    counts = (kept + shape.counts[:max_groups])[: min(max_groups, shape.groups)]
    return replace(
        shape,
        counts=tuple(min(n, 5) for n in counts),
        patches=min(shape.patches, 17) + (2 if shape.patches > 257 else 0),
        feature_width=24,
        heads=2,
        head_dim=16,
        queries=8,
        text_tokens=4,
        layers=4,
        intermediate=48,
        initial_layer=min(shape.initial_layer, 4),
        contextual_layer=min(shape.contextual_layer, 4),
    )
