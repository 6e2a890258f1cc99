"""Where a step's time goes: marks between phases, from module and tensor hooks, so that any loop can be looked at.

    vision, qformer, llm, head, loss   forward and backward; the head is the LLM's output layer
    update                             gradient norm, clipping, AdamW
    other                              copies to the device, embedding, masks, what no mark tells apart

A phase lasts from its mark to the next one. Marks are CUDA events on the stream that works, so a phase is the device's
time, waiting for the host included. A loop that runs its parts otherwise (one image after another) is summed up.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from benchmarks.train.loops import Loop

PARTS = ("vision", "qformer", "llm", "head", "loss", "update", "other")


class Phases:
    """Marks of one step.

    Args:
        timer: `mark()` and `milliseconds(start, end)`, as `benchmarks.kernels.measure.EventTimer`.
    """

    def __init__(self, timer: Any) -> None:
        self.timer = timer
        self.marks: list[tuple[str, Any]] = []

    def enter(self, phase: str) -> None:
        self.marks.append((phase, self.timer.mark()))

    def milliseconds(self) -> dict[str, float]:
        """Phase ("forward llm") -> time, in the order of their first marks."""
        total: dict[str, float] = defaultdict(float)
        for (phase, start), (_, end) in zip(self.marks, self.marks[1:]):
            total[phase] += self.timer.milliseconds(start, end)
        return dict(total)


def by_part(phases: dict[str, float]) -> dict[str, float]:
    """Part -> time, forward and backward together."""
    found = dict.fromkeys(PARTS, 0.0)
    for phase, value in phases.items():
        found[phase.rsplit(" ", 1)[-1]] += value
    return found


@contextlib.contextmanager
def watching(loop: Loop, phases: Phases) -> Iterator[None]:
    """Mark every phase of the loop's steps inside."""
    module: Any = loop.engine.module if hasattr(loop.engine, "module") else loop.module
    language_model = module.language_model
    head = language_model.get_output_embeddings()
    handles: list[Any] = []

    def on_gradient(tensor: Any, phase: str) -> None:
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(lambda gradient: phases.enter(phase))

    def before_llm(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # Its gradient is there when the LLM's backward pass is over.
        on_gradient(kwargs.get("inputs_embeds"), "backward qformer")
        phases.enter("forward llm")

    def before_head(_: nn.Module, args: Any) -> None:
        on_gradient(args[0], "backward llm")
        phases.enter("forward head")

    def after_head(_: nn.Module, args: Any, output: Any) -> None:
        on_gradient(output, "backward head")
        phases.enter("forward loss")

    def after_vision(_: nn.Module, args: Any, output: Any) -> None:
        on_gradient(output.last_hidden_state, "backward vision")
        phases.enter("forward qformer")

    handles.append(module.vision_model.register_forward_pre_hook(lambda *_: phases.enter("forward vision")))
    handles.append(module.vision_model.register_forward_hook(after_vision))
    handles.append(module.language_projection.register_forward_hook(lambda *_: phases.enter("forward other")))
    handles.append(language_model.register_forward_pre_hook(before_llm, with_kwargs=True))
    handles.append(head.register_forward_pre_hook(before_head))
    handles.append(head.register_forward_hook(after_head))
    told = {"forward": "forward other", "optimizer": "update"}  # "backward" begins inside the loss
    loop.on_phase = lambda phase: phases.enter(told[phase]) if phase in told else None
    try:
        phases.enter("other")
        yield
        phases.enter("end")
    finally:
        for handle in handles:
            handle.remove()
        loop.on_phase = lambda phase: None
