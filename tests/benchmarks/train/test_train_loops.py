"""The compared loops compute the same: loss and gradients of ours against code that others wrote."""

from dataclasses import replace

import pytest
import torch

from benchmarks.train.gate import judge, outcome_of
from benchmarks.train.loops import ROWS, Loop, Setting
from benchmarks.train.measure import active
from benchmarks.train.phases import Phases, watching
from benchmarks.train.run import gate, make_loops
from benchmarks.train.samples import StepData, draw_step
from benchmarks.train.shapes import SHAPES, Train
from benchmarks.train.work import Work
from samtrain.core.batch import IGNORE_INDEX

TINY = SHAPES["tiny"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> StepData:
    return draw_step(TINY, text="mini", samples=6, max_images=16)


def loops(data: StepData, train: Train, context: str = "others") -> dict[str, Loop]:
    shape = replace(TINY, context=context)
    setting = Setting(shape, train, torch.float32, CPU)
    rows = [ROWS[name] for name in ("ours", "ours_unguided", "reference")]
    return make_loops(rows, setting, replace(data, shape=shape))


@pytest.mark.parametrize(("train", "context"), [("frozen", "others"), ("lora", "all"), ("full", "others")])
def test_loss_and_gradients_equal_those_of_the_yardsticks(data: StepData, train: Train, context: str) -> None:
    found = loops(data, train, context)
    outcomes = {name: outcome_of(loop) for name, loop in found.items()}
    for name, loop in found.items():
        gate = ROWS[name].gate
        if gate is not None:
            verdict = judge(outcomes[name], outcomes[gate], torch.float32)
            assert verdict.match == "ok", f"{name}: {verdict.why}"
            assert len(verdict.errors) > 1 and loop.module.training
    # The gate can tell models apart: guided and unguided are not the same.
    assert judge(outcomes["ours"], outcomes["instructblip"], torch.float32).match == "FAIL"


@pytest.mark.parametrize("broken", ["ours", "instructblip"])
def test_the_gate_outlives_a_row_that_raises(data: StepData, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    found = loops(data, "frozen")

    def refuse(batch: object) -> torch.Tensor:
        raise RuntimeError("it does not compile")

    monkeypatch.setattr(found[broken], "loss_sum", refuse)
    verdicts = gate(found, torch.float32)
    assert verdicts[broken].match == "error" and "it does not compile" in verdicts[broken].why
    assert verdicts["reference"].match == "ok"
    assert verdicts["ours_unguided"].match == ("-" if broken == "instructblip" else "ok")


def test_models_share_memory_and_train_on_their_own(data: StepData) -> None:
    found = loops(data, "frozen")
    ours, blip = found["ours"].module, found["instructblip"].module
    theirs = dict(blip.named_parameters())
    for name, parameter in ours.named_parameters():
        if name in theirs:
            assert parameter.data_ptr() == theirs[name].data_ptr() and parameter is not theirs[name]
    trained = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert all(n.startswith("guidance.") for n in trained)
    assert {n for n, p in theirs.items() if p.requires_grad} == {
        "language_projection.weight", "language_projection.bias"
    }  # fmt: skip


def test_a_step_changes_what_trains_and_nothing_else(data: StepData) -> None:
    setting = Setting(TINY, "frozen", torch.float32, CPU)
    ours = ROWS["ours"].make(setting, data, None)
    before = {n: p.detach().clone() for n, p in ours.module.named_parameters()}
    with active(ours):
        first = float(ours.step())
        assert ours.engine.grad_norm > 0
    changed = {n for n, p in ours.module.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(n.startswith("guidance.") for n in changed)
    assert first / ours.num_labels == pytest.approx(outcome_of(ours).loss, rel=0.02)  # and it goes on from there


class Ticks:
    """Every mark is one later than the one before."""

    def __init__(self) -> None:
        self.count = 0

    def mark(self) -> int:
        self.count += 1
        return self.count

    def milliseconds(self, start: int, end: int) -> float:
        return float(end - start)


@pytest.mark.parametrize("name", ["ours", "instructblip", "reference"])
def test_every_phase_of_a_step_is_marked_in_order(data: StepData, name: str) -> None:
    loop = loops(data, "frozen")[name]
    phases = Phases(Ticks())
    with active(loop):
        with watching(loop, phases):
            loop.step()
        first = [phase for phase, _ in phases.marks]
        loop.step()
        assert len(phases.marks) == len(first)  # the hooks are gone
    assert [p for p in dict.fromkeys(first) if p != "other"] == [
        "forward other", "forward vision", "forward qformer", "forward llm", "forward head", "forward loss",
        "backward head", "backward llm", "backward qformer", "update", "end",
    ]  # fmt: skip
    assert sum(phases.milliseconds().values()) == len(first) - 1


def test_packs_keep_every_sample_and_budget(data: StepData) -> None:
    assert sorted(i for chosen in data.packs for i in chosen) == list(range(6))
    step = data.global_step()
    assert sum(batch.num_tokens for batch in step.micro_batches) == data.num_tokens
    assert sum(batch.num_label_tokens for batch in step.micro_batches) == data.num_labels
    assert all(batch.num_images <= 16 for batch in step.micro_batches)


def test_padded_rows_hold_the_same_samples(data: StepData) -> None:
    setting = Setting(TINY, "frozen", torch.float32, CPU)
    ours = ROWS["ours"].make(setting, data, None)
    for name in ("instructblip", "reference"):
        loop = ROWS[name].make(setting, data, ours.module)
        assert sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in loop.batches) == data.num_labels
        assert sum(int(batch["attention_mask"].sum()) for batch in loop.batches) == data.num_tokens
        assert loop.num_padded_tokens > ours.num_padded_tokens == data.num_tokens


def test_work_is_split_into_parts_that_add_up(data: StepData) -> None:
    from benchmarks.train.shapes import trains
    from samtrain.model.flops import FlopCounter

    work = Work(Setting(TINY, "frozen", torch.float32, CPU), data, guided=True)
    counter = FlopCounter(TINY.config(guided=True), trains("frozen", guided=True), image_size=TINY.image_size)
    expected = {"vision": 0.0, "qformer": 0.0, "llm": 0.0}
    for batch in data.global_step().micro_batches:
        for part, flops in counter.batch(batch).items():
            expected[part] += flops
    assert work.parts["vision"] == pytest.approx(expected["vision"])
    assert work.parts["qformer"] == pytest.approx(expected["qformer"])
    assert work.parts["llm"] + work.parts["head"] == pytest.approx(expected["llm"])
    assert work.parts["head"] > 0
