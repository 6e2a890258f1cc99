"""The chunked loss is cross-entropy, value and gradient, and takes the memory it promises."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from samtrain.core.batch import IGNORE_INDEX
from samtrain.model import loss
from samtrain.model.loss import summed_loss


def plain(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(
        wide.flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def inputs(*shape: int, dtype: torch.dtype, ignored: float = 0.3) -> tuple[Tensor, Tensor]:
    """Logits [*shape] and targets [*shape[:-1]], a part of which does not count."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).mul(5).to(dtype).requires_grad_()
    targets = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    return logits, targets.masked_fill(torch.rand(shape[:-1], generator=generator) < ignored, IGNORE_INDEX)


@pytest.mark.parametrize("rows", [1, 4, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 21, 50), (2, 5, 3), (1, 1, 8)])
def test_value_and_gradient_are_those_of_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype, rows: int
) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", rows * shape[-1])
    logits, targets = inputs(*shape, dtype=dtype)
    found, expected = summed_loss(logits, targets), plain(logits, targets)
    (ours,), (theirs,) = (torch.autograd.grad(one * 0.7, logits) for one in (found, expected))
    assert found.dtype == expected.dtype and ours.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)
    # Both round a float32 gradient to bf16: one step of its 8 bits apart at most.
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=2e-6)
    assert (ours[targets == IGNORE_INDEX] == 0).all()


def test_gradcheck() -> None:
    logits, targets = inputs(4, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(summed_loss, (logits, targets))


def test_rows_that_do_not_count_touch_nothing_even_where_they_are_not_finite() -> None:
    logits, targets = inputs(3, 6, dtype=torch.float32, ignored=0.0)
    targets[1] = IGNORE_INDEX
    with torch.no_grad():
        logits[1] = float("nan")
    found = summed_loss(logits, targets)
    found.backward()
    assert torch.isfinite(found) and torch.isfinite(logits.grad).all()
    nothing = summed_loss(logits, torch.full_like(targets, IGNORE_INDEX))
    assert float(nothing.detach()) == 0.0 and nothing.requires_grad


def peak(function: Any, logits: Tensor, targets: Tensor) -> int:
    """Bytes that forward and backward hold at once, the logits among them."""
    with MemTracker() as tracker:
        torch.autograd.grad(function(logits, targets), logits)
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def test_no_float32_copy_of_the_logits_is_ever_held(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, words = 512, 1000
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 8 * words)
    logits, targets = inputs(rows, words, dtype=torch.bfloat16)
    assert peak(plain, logits, targets) > 5 * logits.nbytes
    assert peak(summed_loss, logits, targets) < 2.2 * logits.nbytes  # they, their gradient, some chunks of 8 rows
