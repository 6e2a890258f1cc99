"""The floors reproduce the figures the kernels were designed with: shape A, 790 TFLOP/s, 4.3 TB/s."""

import pytest

from benchmarks.kernels.floors import How, Rates, Work, cross, feature_bytes, floor, key_value_bytes, op, qformer
from benchmarks.kernels.shapes import CONTEXTS, LEVELS, SHAPES, Context

A = SHAPES["A"]
RATES = Rates(flops=790e12, bytes=4.3e12)


def rounded(work: Work) -> tuple[int, int, int]:
    """GFLOP, MB, microseconds."""
    return round(work.flops / 1e9), round(work.bytes / 1e6), round(work.seconds(RATES) * 1e6)


def test_features_and_keys_and_values_have_the_known_sizes() -> None:
    assert round(feature_bytes(A, A.images) / 1e6, 1) == 57.9
    assert round(key_value_bytes(A, A.images) / 1e6, 1) == 63.2


@pytest.mark.parametrize(
    ("context", "how", "expected"),
    [
        ("others", "reference", (182, 384, 258)),
        ("others", "materialised", (182, 384, 258)),
        ("others", "mixed", (93, 389, 175)),
        ("others", "context", (93, 263, 146)),
        ("others", "fused", (93, 200, 131)),
        ("all", "reference", (182, 384, 258)),
        ("all", "materialised", (109, 231, 155)),
        ("all", "mixed", (91, 282, 150)),
        ("all", "context", (91, 257, 144)),
        ("all", "fused", (91, 194, 129)),
    ],
)
def test_forward_of_one_layer(context: Context, how: How, expected: tuple[int, int, int]) -> None:
    got = rounded(cross(A, context, how, trained=False, direction="forward"))
    assert got == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("context", "how", "trained", "expected"),
    [
        ("others", "materialised", True, (277, 584, 404)),
        ("others", "fused", True, (99, 284, 150)),
        ("others", "materialised", False, (94, 263, 146)),
        ("others", "fused", False, (5, 84, 19)),
        ("all", "materialised", True, (131, 327, 197)),
        ("all", "fused", True, (95, 267, 147)),
        ("all", "materialised", False, (19, 53, 29)),
        ("all", "fused", False, (1, 67, 16)),
    ],
)
def test_backward_of_one_layer(context: Context, how: How, trained: bool, expected: tuple[int, int, int]) -> None:
    assert rounded(cross(A, context, how, trained=trained, direction="backward")) == expected


@pytest.mark.parametrize(("images", "materialised", "fused"), [(2, 103, 52), (5, 258, 131), (10, 516, 262)])
def test_the_floor_grows_with_the_number_of_images(images: int, materialised: int, fused: int) -> None:
    shape = SHAPES["B"].__class__("x", (images,) * 16)
    for how, expected in (("materialised", materialised), ("fused", fused)):
        work = cross(shape, "others", how, trained=False, direction="forward")  # type: ignore[arg-type]
        assert work.seconds(RATES) * 1e6 == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("context", "how", "forward", "frozen", "trained"),
    [
        ("others", "reference", (3.83, 5.63), (2.04, 3.08), (7.13, 10.59)),
        ("all", "reference", (3.83, 5.63), (2.04, 3.08), (7.13, 10.59)),
        ("others", "materialised", (None, 5.31), (None, 2.99), (None, 10.59)),
        ("others", "fused", (3.08, 4.54), (1.45, 2.23), (6.07, 9.07)),
        ("all", "materialised", (None, 3.29), (None, 0.79), (None, 6.35)),
        ("all", "fused", (2.13, 3.14), (0.42, 0.71), (4.03, 6.05)),
    ],
)
def test_the_whole_qformer(
    context: Context,
    how: How,
    forward: tuple[float | None, float],
    frozen: tuple[float | None, float],
    trained: tuple[float | None, float],
) -> None:
    """TFLOP and milliseconds. Forward within rounding; backward within 1 % (which small parts are free is a choice)."""
    for work, (teraflop, milliseconds), slack in (
        (qformer(A, context, how, trained=False, direction="forward"), forward, 0.0),
        (qformer(A, context, how, trained=False, direction="backward"), frozen, 0.01),
        (qformer(A, context, how, trained=True, direction="backward"), trained, 0.01),
    ):
        if teraflop is not None:
            assert work.flops / 1e12 == pytest.approx(teraflop, abs=0.0051, rel=slack)
        assert work.seconds(RATES) * 1e3 == pytest.approx(milliseconds, abs=0.0051, rel=slack)


def test_no_way_is_below_the_fused_floor() -> None:
    for shape in SHAPES.values():
        for context in CONTEXTS:
            hows: tuple[How, ...] = ("reference", "materialised", "mixed", "context")
            least = cross(shape, context, "fused", trained=False, direction="forward").seconds(RATES)
            for how in hows:
                assert cross(shape, context, how, trained=False, direction="forward").seconds(RATES) >= least


def test_every_level_has_a_floor_in_both_directions() -> None:
    for level in LEVELS:
        for shape in SHAPES.values():
            for context in CONTEXTS:
                for trained in (False, True):
                    for direction in ("forward", "backward"):
                        work = floor(level, shape, context, trained=trained, direction=direction)  # type: ignore[arg-type]
                        assert work.flops > 0 and work.bytes > 0


def test_a_trained_op_writes_the_gradients_of_keys_and_values_as_well() -> None:
    frozen, trained = (op(A, "others", trained=t, direction="backward").bytes for t in (False, True))
    assert trained - frozen == key_value_bytes(A, A.images)


def test_a_kind_without_a_backward_floor_is_refused() -> None:
    with pytest.raises(ValueError, match="no backward floor for 'mixed'"):
        cross(A, "others", "mixed", trained=False, direction="backward")
