import io
from typing import Any

from rich.console import Console

from samtrain.launch.progress_display import ProgressDisplay


def step(number: int, *, last: int = 100) -> dict[str, Any]:
    metrics = {
        "train/loss": 2.0 / number,
        "train/learning_rate": 1e-5,
        "perf/images_per_s_per_gpu": 12.34,
        "perf/tokens_per_s_per_gpu": 5678.9,
        "memory/max_reserved_gib": 1.5,
    }
    return {"kind": "step", "step": number, "max_steps": last, "metrics": metrics, "eta_seconds": 3661.0}


def shown(events: list[dict[str, Any]], *, times: list[float] | None = None, terminal: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=140, force_terminal=terminal, color_system=None)
    clock = iter(times) if times else None
    with ProgressDisplay(console, clock=lambda: next(clock) if clock else 0.0) as display:
        for event in events:
            display.handle(event)
    return stream.getvalue()


def test_a_step_tells_loss_rate_throughput_memory_and_time_left() -> None:
    line = shown([step(4)]).strip()
    assert line == (
        "step 4/100  loss 0.5000  lr 1.00e-05  images/s/worker 12.3  tokens/s/worker 5679  memory 1.50 GiB  ETA 1:01:01"
    )


def test_plain_lines_come_at_most_once_a_second_and_the_last_step_always() -> None:
    class Clock:
        now = 0.0

    stream = io.StringIO()
    with ProgressDisplay(Console(file=stream, width=140), clock=lambda: Clock.now) as display:
        for number in range(1, 101):
            Clock.now = number * 0.1
            display.handle(step(number))
    lines = stream.getvalue().splitlines()
    assert 10 <= len(lines) <= 12
    assert lines[0].startswith("step 1/100") and lines[-1].startswith("step 100/100")


def test_a_run_that_ends_early_still_shows_its_last_step() -> None:
    lines = shown([step(1), step(2), step(3)]).splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", "3/100"]


def test_messages_are_never_held_back_and_warnings_say_so() -> None:
    events = [{"kind": "message", "level": level, "text": f"hello {level} [brackets]"} for level in ("info", "warning")]
    assert shown(events).splitlines() == ["hello info [brackets]", "warning: hello warning [brackets]"]


def test_a_held_back_step_is_printed_before_the_message_that_follows_it() -> None:
    lines = shown([step(1), step(2), {"kind": "message", "level": "info", "text": "saved"}]).splitlines()
    assert [line.split()[0] for line in lines] == ["step", "step", "saved"]


def test_tables_show_every_cell() -> None:
    table = {"kind": "eval", "title": "scores", "columns": ["set", "cider"], "rows": [["test.naming", 51.23456]]}
    summary = {"kind": "summary", "title": "tiny: finished", "rows": [["output", "runs/tiny"], ["steps", 3]]}
    text = shown([table, summary])
    for expected in ("scores", "cider", "test.naming", "51.23", "tiny: finished", "runs/tiny"):
        assert expected in text


def test_a_terminal_has_one_line_that_rewrites_itself() -> None:
    text = shown([step(1), step(2), step(3, last=3)], terminal=True)
    assert text.count("\n") <= 2 and "step 3/3" in text


def test_progress_of_other_things_is_a_line_too() -> None:
    lines = shown([{"kind": "progress", "what": "rendering", "done": d, "total": 2} for d in (0, 1, 2)]).splitlines()
    assert lines == ["rendering 0/2", "rendering 2/2"]
