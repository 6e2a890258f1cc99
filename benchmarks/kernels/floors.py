"""The least work that each level needs, and the time it would take at given rates: pure functions of the shape.

A `Work` is a list of stages that follow one another. A stage cannot be faster than its arithmetic at the matmul rate,
nor than its bytes at the copy bandwidth: its floor is the larger of the two, and a level's floor is the sum.

Counted once each: every matmul operand and result that has to live in device memory between stages, in 2 bytes. Not
counted: weights of linear layers, mixing weights (0.4 MB where a layer's keys and values are 63 MB), softmax
statistics. Attention backward is five matmuls where forward is two (the scores are recomputed, not stored).

    how           the W stream's keys and values
    reference     of a contextual feature per image, each projected (with `all` too: what a loop over images does)
    materialised  of every contextual feature, projected
    mixed         the images' keys and values, mixed by one elementwise pass
    context       the images' own, read by a kernel of its own
    fused         the images' own, read once for both streams: the floor

The effective rates in the tables divide the floor's operations and bytes (`fused`) by the measured time, for every row:
an implementation that recomputes or moves more does not look faster for it.
"""

from dataclasses import dataclass
from typing import Literal

from benchmarks.kernels.shapes import Context, Level, Shape

How = Literal["reference", "materialised", "mixed", "context", "fused"]
Pass = Literal["forward", "backward"]

ELEMENT = 2  # bytes of a bfloat16
# A normalisation with its residual, in passes over the hidden states. Forward reads two and writes one; backward of a
# trained layer reads three, writes the sum, and adds two residual gradients; of a frozen one it reads and writes one.
NORM_PASSES = {"forward": 3, "backward frozen": 2, "backward trained": 6}


@dataclass(frozen=True)
class Rates:
    """What a device does at best: operations and bytes per second, measured in the same run."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Stage:
    """One kernel's work: floating-point operations (a multiply-add is two) and bytes of device memory."""

    name: str
    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Work:
    """Stages one after the other."""

    stages: tuple[Stage, ...]

    @property
    def flops(self) -> float:
        return sum(stage.flops for stage in self.stages)

    @property
    def bytes(self) -> float:
        return sum(stage.bytes for stage in self.stages)

    def seconds(self, rates: Rates) -> float:
        return sum(max(stage.flops / rates.flops, stage.bytes / rates.bytes) for stage in self.stages)

    def __add__(self, other: "Work") -> "Work":
        return Work(self.stages + other.stages)


def floor(level: Level, shape: Shape, context: Context, *, trained: bool, direction: Pass) -> Work:
    """The least work of a level: the divisor of "% of floor" and the numerator of the effective rates."""
    if level == "mix":
        return mix(shape)
    if level == "op":
        return op(shape, context, trained=trained, direction=direction)
    if level == "cross":
        return cross(shape, context, "fused", trained=trained, direction=direction)
    return qformer(shape, context, "fused", trained=trained, direction=direction)


def feature_bytes(shape: Shape, rows: int) -> int:
    """F, or the contextual features, of `rows` rows: [rows, P, C]."""
    return ELEMENT * rows * shape.patches * shape.feature_width


def key_value_bytes(shape: Shape, rows: int) -> int:
    """Keys and values of one layer: [rows, P, 2, H, D]."""
    return ELEMENT * rows * shape.patches * 2 * shape.width


def query_bytes(shape: Shape, rows: int) -> int:
    """Queries, or outputs, of one layer: [rows, Q, H, D]."""
    return ELEMENT * rows * shape.queries * shape.width


def projection_flops(shape: Shape, rows: int) -> float:
    """The key/value projection of one layer for `rows` images or contexts."""
    return 2.0 * rows * shape.patches * shape.feature_width * 2 * shape.width


def attention_flops(shape: Shape, rows: int) -> float:
    """Scores and outputs of one cross-attention."""
    return 4.0 * rows * shape.queries * shape.patches * shape.width


def weight_gradient_bytes(shape: Shape, context: Context) -> int:
    """Gradient of the mixing weights before the sum over heads, float32: [contexts x images, H, P]."""
    return 4 * shape.slots(context) * shape.heads * shape.patches


def mix(shape: Shape) -> Work:
    """Forward, or gradient of the score weight: each one read of the features."""
    rows = shape.images * shape.patches
    return Work((Stage("patch logits", 2.0 * rows * shape.feature_width, feature_bytes(shape, shape.images)),))


def op(shape: Shape, context: Context, *, trained: bool, direction: Pass) -> Work:
    """The W stream's cross-attention on the images' own keys and values."""
    contexts = shape.contexts(context)
    images = key_value_bytes(shape, shape.images)
    if direction == "forward":
        moved = images + 2 * query_bytes(shape, contexts)
        return Work((Stage("context attention", attention_flops(shape, contexts), moved),))
    moved = images * (2 if trained else 1) + 4 * query_bytes(shape, contexts) + weight_gradient_bytes(shape, context)
    return Work((Stage("context attention", 2.5 * attention_flops(shape, contexts), moved),))


def cross(shape: Shape, context: Context, how: How, *, trained: bool, direction: Pass) -> Work:
    """Cross-attention of both streams in one layer, projections of keys and values included."""
    if direction == "forward":
        return Work(tuple(_cross_forward(shape, context, how)))
    return Work(tuple(_cross_backward(shape, context, how, trained=trained)))


def _contexts(shape: Shape, context: Context, how: How) -> int:
    return shape.images if how == "reference" else shape.contexts(context)


def _cross_forward(shape: Shape, context: Context, how: How) -> list[Stage]:
    images, contexts = shape.images, _contexts(shape, context, how)
    stages = [_projection(shape, images, "images")]
    if how in ("reference", "materialised"):
        stages.append(_projection(shape, contexts, "contexts"))
    if how == "mixed":
        stages.append(
            Stage("mix keys and values", 0.0, key_value_bytes(shape, images) + key_value_bytes(shape, contexts))
        )
    if how == "fused":
        moved = key_value_bytes(shape, images) + 2 * query_bytes(shape, images + contexts)
        return [*stages, Stage("both attentions", attention_flops(shape, images + contexts), moved)]
    read = images if how == "context" else contexts
    return [*stages, _attention(shape, images, images, "Q"), _attention(shape, contexts, read, "W")]


def _cross_backward(shape: Shape, context: Context, how: How, *, trained: bool) -> list[Stage]:
    """Frozen: gradients of the W stream's queries and of the mixing weights. Trained: of all but the features."""
    images, contexts = shape.images, _contexts(shape, context, how)
    projected, features = key_value_bytes(shape, contexts), feature_bytes(shape, contexts)
    own = key_value_bytes(shape, images) + feature_bytes(shape, images)
    weight = Stage("gradient of the projection, images", projection_flops(shape, images), own)
    if how in ("reference", "materialised"):
        stages = [_attention_backward(shape, contexts, contexts, "W")]
        # One read of the gradient of keys and values serves the contextual features and, where it trains, the weight.
        stages.append(Stage("gradient of contextual features", projection_flops(shape, contexts), projected + features))
        if trained:
            stages.append(Stage("gradient of the projection, contexts", projection_flops(shape, contexts), features))
            stages = [_attention_backward(shape, images, images, "Q"), weight, *stages]
        return stages
    if how != "fused":
        raise ValueError(f"no backward floor for {how!r}; choose reference, materialised or fused")
    rows = contexts + (images if trained else 0)
    moved = key_value_bytes(shape, images) * (2 if trained else 1) + 4 * query_bytes(shape, rows)
    moved += weight_gradient_bytes(shape, context)
    both = Stage("attention", 2.5 * attention_flops(shape, rows), moved)
    return [both, weight] if trained else [both]


def _projection(shape: Shape, rows: int, of: str) -> Stage:
    moved = feature_bytes(shape, rows) + key_value_bytes(shape, rows)
    return Stage(f"keys and values of {of}", projection_flops(shape, rows), moved)


def _attention(shape: Shape, rows: int, read: int, stream: str) -> Stage:
    moved = key_value_bytes(shape, read) + 2 * query_bytes(shape, rows)
    return Stage(f"{stream} attention", attention_flops(shape, rows), moved)


def _attention_backward(shape: Shape, rows: int, read: int, stream: str) -> Stage:
    moved = 2 * key_value_bytes(shape, read) + 4 * query_bytes(shape, rows)
    return Stage(f"{stream} attention", 2.5 * attention_flops(shape, rows), moved)


def qformer(shape: Shape, context: Context, how: How, *, trained: bool, direction: Pass) -> Work:
    """The whole two-stream Q-Former.

    `reference` repeats everything for every image and stream. The others take what is free: one W row per sample up to
    layer l with `all`; in the forward pass layer 1's self-attention and text once per sample for both streams, and of
    the Q stream's last layer only what its query outputs need; no W stream after layer k. Frozen: gradients towards the
    W stream's context, and the Q stream's from layer k on; the embeddings need none.
    """
    layers = range(1, shape.layers + 1)
    if direction == "forward":
        return Work(tuple(stage for t in layers for stage in _layer_forward(shape, context, how, t)))
    return Work(tuple(stage for t in layers for stage in _layer_backward(shape, context, how, t, trained=trained)))


def _w_rows(shape: Shape, context: Context, how: How, t: int) -> int:
    """Rows of the W stream in layer `t` (1-based)."""
    is_shared = context == "all" and how != "reference" and t < shape.initial_layer
    if how != "reference" and t > shape.contextual_layer:
        return 0
    return shape.groups if is_shared else shape.images


def _layer_forward(shape: Shape, context: Context, how: How, t: int) -> list[Stage]:
    rows, w_rows = shape.images, _w_rows(shape, context, how, t)
    queries, length, text = shape.queries, shape.length, shape.text_tokens
    if how != "reference" and t == 1:
        stages = [*_self(shape, shape.groups, length), *_mlp(shape, shape.groups, text)]
        stages += [*_mlp(shape, rows, queries), *_mlp(shape, w_rows, queries)]
    elif how != "reference" and t == shape.layers:
        stages = [*_self(shape, rows, queries), *_self(shape, w_rows, length)]
        stages += [*_mlp(shape, rows, queries), *_mlp(shape, w_rows, length)]
    else:
        stages = [stage for r in (rows, w_rows) for stage in (*_self(shape, r, length), *_mlp(shape, r, length))]
    if _has_cross(shape, t):
        stages += [*_around_cross(shape, rows), *_around_cross(shape, w_rows)]
        stages += _cross_forward(shape, _cross_context(context, w_rows, shape), how)
    return stages


def _layer_backward(shape: Shape, context: Context, how: How, t: int, *, trained: bool) -> list[Stage]:
    rows, w_rows = shape.images, _w_rows(shape, context, how, t)
    length = shape.length
    stages: list[Stage] = []
    if trained:
        for r in (rows, w_rows):
            stages += [*_self_backward(shape, r, length, trained=True), *_mlp_backward(shape, r, length, trained=True)]
    else:
        if t > 1:  # nothing below layer 1's cross-attention has a gradient
            stages += _self_backward(shape, w_rows, length, trained=False)
        stages += _mlp_backward(shape, w_rows, length, trained=False)
        if t >= shape.contextual_layer:
            only = shape.queries if how != "reference" and t == shape.layers else length
            stages += [*_self_backward(shape, rows, only, trained=False)]
            stages += [*_mlp_backward(shape, rows, only, trained=False)]
    if _has_cross(shape, t):
        stages += _around_cross_backward(shape, w_rows, trained=trained)
        if trained or t >= shape.contextual_layer:
            stages += _around_cross_backward(shape, rows, trained=trained)
        stages += _cross_backward(shape, _cross_context(context, w_rows, shape), how, trained=trained)
    return stages


def _has_cross(shape: Shape, t: int) -> bool:
    return (t - 1) % shape.cross_frequency == 0


def _cross_context(context: Context, w_rows: int, shape: Shape) -> Context:
    """From layer l on `all` too has a W row for every image: as many queries as with `others`."""
    return "others" if context == "others" or w_rows == shape.images else "all"


def _self(shape: Shape, rows: int, positions: int) -> list[Stage]:
    """Self-attention of which `positions` outputs are needed: keys and values of all L, queries of those."""
    width, length = shape.width, shape.length
    share = positions / length
    return [
        Stage("self-attention projections", 4.0 * rows * length * width**2 * (1 + share)),
        Stage(
            "self-attention",
            4.0 * rows * positions * length * width,
            ELEMENT * rows * width * 2 * (length + positions),
        ),
        _norm(shape, rows, positions, "forward"),
    ]


def _self_backward(shape: Shape, rows: int, positions: int, *, trained: bool) -> list[Stage]:
    width, length = shape.width, shape.length
    share, times = positions / length, 2 if trained else 1
    return [
        Stage("self-attention projections", times * 4.0 * rows * length * width**2 * (1 + share)),
        Stage(
            "self-attention",
            10.0 * rows * positions * length * width,
            ELEMENT * rows * width * 4 * (length + positions),
        ),
        _norm(shape, rows, positions, "backward trained" if trained else "backward frozen"),
    ]


def _mlp(shape: Shape, rows: int, positions: int) -> list[Stage]:
    flops = 4.0 * rows * positions * shape.width * shape.intermediate
    return [Stage("MLP", flops), _norm(shape, rows, positions, "forward")]


def _mlp_backward(shape: Shape, rows: int, positions: int, *, trained: bool) -> list[Stage]:
    flops = (2 if trained else 1) * 4.0 * rows * positions * shape.width * shape.intermediate
    return [Stage("MLP", flops), _norm(shape, rows, positions, "backward trained" if trained else "backward frozen")]


def _around_cross(shape: Shape, rows: int) -> list[Stage]:
    """Query and output projection."""
    flops = 4.0 * rows * shape.queries * shape.width**2
    return [Stage("cross-attention projections", flops), _norm(shape, rows, shape.queries, "forward")]


def _around_cross_backward(shape: Shape, rows: int, *, trained: bool) -> list[Stage]:
    flops = (2 if trained else 1) * 4.0 * rows * shape.queries * shape.width**2
    norm = _norm(shape, rows, shape.queries, "backward trained" if trained else "backward frozen")
    return [Stage("cross-attention projections", flops), norm]


def _norm(shape: Shape, rows: int, positions: int, kind: str) -> Stage:
    return Stage("normalisation", 0.0, ELEMENT * NORM_PASSES[kind] * rows * positions * shape.width)
