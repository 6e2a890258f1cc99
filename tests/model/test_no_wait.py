"""In a training step the host never waits for the device, which would stand idle afterwards until the host is ahead.

No GPU is needed: what waits is seen among the operations. `cpu` runs with values; on `meta` tensors have none, so that
everything that needs one fails, and copies from the host are seen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from samtrain.core.batch import GlobalStep, ImageGroups
from samtrain.engine.step import ReducedCounts, StepCounts, run_step
from samtrain.model.attention import packed_attention
from samtrain.model.freezing import apply_freezing
from samtrain.model.lora import attach_lora
from samtrain.model.options import LoraOptions, TrainablePartsOptions

aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
READERS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}  # read memory, without an operation
MAKERS = {torch.tensor, torch.as_tensor, torch.asarray}  # with `device`, they copy from ordinary memory


def waits(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a host needs the device's answer to go on: a value, or the shape of a result."""
    if operation in INDEXING:  # a mask as index is a `nonzero`
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if operation is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None:
        return False
    if operation is aten._to_copy.default:
        target = torch.device(kwargs.get("device") or args[0].device)
        return target.type != args[0].device.type and not kwargs.get("non_blocking")
    if operation is aten.copy_.default:
        is_blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        return args[0].device.type != args[1].device.type and is_blocking
    if operation is aten.masked_scatter_backward.default:  # a `masked_select` inside
        return True
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(operation.tags))


class Operations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits(func, args, kwargs or {}):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READERS or (func in MAKERS and (kwargs or {}).get("device") is not None):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[list[str]]:
    """Names of what waits, in order."""
    found: list[str] = []
    with Calls(found), Operations(found):
        yield found


@pytest.mark.parametrize(
    "act",
    [
        lambda x: float(x[0]),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.index_put((x > 0,), x[0]),
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: x.long().abs().repeat_interleave(x.long().abs()),
        lambda x: x.to("meta"),
        lambda x: torch.empty(3, device="meta").copy_(x),
        lambda x: torch.tensor([1.0], device="cpu"),
        lambda x: x.tolist(),
        lambda x: x.requires_grad_().clone().masked_scatter(x > 0, x).sum().backward(),
    ],
)
def test_what_waits_is_seen(act: Any) -> None:
    with watched() as found:
        act(torch.tensor([1.0, 0.0, 2.0]))
    assert found


def test_what_does_not_wait_is_not() -> None:
    x = torch.tensor([1.0, 0.0, 2.0])
    with watched() as found:
        x[torch.tensor([0, 2])].masked_fill(x[:2] > 0, 0.0).sum()
        (x > 0).nonzero_static(size=2)
        x.to("meta", non_blocking=True)
    assert not found


TRAINED = {
    "guidance": TrainablePartsOptions(),
    "lora": TrainablePartsOptions(projection=True, language_model="lora"),
    "everything": TrainablePartsOptions(vision=True, qformer=True, projection=True, language_model="full"),
}


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kernels", ["reference", "materialised"])
@pytest.mark.parametrize("context", ["others", "own"])
@pytest.mark.parametrize(
    ("device", "train"), [("cpu", "guidance"), ("cpu", "lora"), ("cpu", "everything"), ("meta", "everything")]
)
def test_forward_and_backward_never_wait(
    tiny_model: Any,
    make_batch: Any,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    train: str,
    context: str,
    kernels: str,
    is_checkpointed: bool,
) -> None:
    if device == "meta":
        autocast = torch.autocast  # knows no meta device
        monkeypatch.setattr(torch, "autocast", lambda device_type, **kwargs: autocast("cpu", **kwargs))
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)
    model = tiny_model(
        random_guidance=True, order_embedding=True, dropout=0.0, kernels=kernels, guidance_context=context
    ).train()
    if TRAINED[train].language_model == "lora":
        attach_lora(model, LoraOptions(r=2))
    apply_freezing(model, TRAINED[train])
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    model = model.to(device)
    for counts in ([2, 0, 3], [0, 0]):
        batch = make_batch(counts)
        with watched() as found:
            model(**batch.to(device, non_blocking=True).model_inputs()).loss_sum.backward()
        assert not found, counts
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_variable_length_arguments_are_numbers_of_the_host() -> None:
    borders = torch.tensor([0, 4, 9], dtype=torch.int32, device="meta")
    with watched() as found:
        arguments = packed_attention(
            borders, max_seqlen=5, num_tokens=9, dtype=torch.float32, attn_implementation="flash_attention_2"
        )
    assert not found and arguments["max_length_q"] == arguments["max_length_k"] == 5


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_masks_of_a_pack_are_made_on_the_device(attention: str) -> None:
    borders = torch.tensor([0, 4, 9], dtype=torch.int32)
    for device in ("cpu", "meta"):
        on_device = borders.to(device)
        with watched() as found:
            packed_attention(
                on_device, max_seqlen=None, num_tokens=9, dtype=torch.float32, attn_implementation=attention
            )
        assert not found


def test_the_dummy_image_has_the_tables_the_host_would_build() -> None:
    for num_samples in (1, 3):
        made = ImageGroups.of_one_image(num_samples, device=torch.device("cpu"))
        expected = ImageGroups.from_counts([1] + [0] * (num_samples - 1))
        for name in ImageGroups.__dataclass_fields__:
            ours, theirs = getattr(made, name), getattr(expected, name)
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name


def test_a_step_reads_its_counts_once_at_its_end(tiny_model: Any, make_batch: Any) -> None:
    model = tiny_model(random_guidance=True, kernels="reference").train()
    apply_freezing(model, TrainablePartsOptions())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    seen_before_update: list[str] = []

    def update() -> None:
        seen_before_update.extend(found)
        optimizer.step()

    engine: Any = SimpleNamespace(  # DeepSpeed's own part is its own business
        device=torch.device("cpu"),
        world_size=1,
        has_overflowed=False,
        forward=lambda batch: model(**batch.model_inputs()),
        backward=lambda loss, is_last: loss.backward(),
        step=update,
    )
    watchdog: Any = SimpleNamespace(enter=lambda *args, **kwargs: None)
    step = GlobalStep((make_batch([2, 3]), make_batch([1])), {})
    with watched() as found:
        result = run_step(engine, step, step_number=1, watchdog=watchdog)
    assert not seen_before_update and found == ["tolist"]
    assert result.counts.label_tokens == 9 and float(result.loss_sum) > 0


def test_counts_reach_the_device_without_a_wait() -> None:
    with watched() as found:
        counts = ReducedCounts(StepCounts(3, 2, 1, 1, 0, 0, 0), device=torch.device("meta"))
    assert not found and counts.label_tokens.device.type == "meta"
