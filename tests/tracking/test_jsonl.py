import json
import math

from samtrain.tracking.curves import curves_figure
from samtrain.tracking.jsonl import JsonlLog, read_rows


def test_every_line_is_on_disk_at_once_and_plain_json(tmp_path):
    log = JsonlLog(tmp_path / "out" / "logging.jsonl")
    log.log_metrics({"train/loss": math.nan, "x": -math.inf, "y": 2}, step=3)
    (line,) = log.path.read_text().splitlines()

    def refuse(constant):
        raise AssertionError(constant)

    row = json.loads(line, parse_constant=refuse)
    assert row["step"] == 3 and row["train/loss"] == "NaN" and row["x"] == "-Infinity" and row["y"] == 2.0
    (back,) = read_rows(log.path)
    assert math.isnan(back["train/loss"]) and back["x"] == -math.inf


def test_resume_drops_later_and_torn_lines_and_appends(tmp_path):
    path = tmp_path / "logging.jsonl"
    log = JsonlLog(path)
    for step in range(5):
        log.log_metrics({"loss": float(step)}, step=step)
    log.close()
    with open(path, "a") as stream:
        stream.write('{"step": 2, "lo')
    log = JsonlLog(path, resumed_step=2)
    log.log_metrics({"loss": 30.0}, step=3)
    assert [(row["step"], row["loss"]) for row in read_rows(path)] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_new_run_starts_the_file_anew(tmp_path):
    JsonlLog(tmp_path / "logging.jsonl").log_metrics({"loss": 1.0}, step=0)
    JsonlLog(tmp_path / "logging.jsonl")
    assert read_rows(tmp_path / "logging.jsonl") == [] == read_rows(tmp_path / "absent.jsonl")


def test_curves_show_a_panel_for_what_there_is(tmp_path):
    rows = [{"step": s, "train/loss": 1 / (s + 1), "train/learning_rate": 0.1, "eval/loss": math.nan} for s in range(9)]
    figure = curves_figure(rows, title="mini")
    assert [axes.get_title() for axes in figure.axes] == ["loss", "learning rate"]
    (line,) = figure.axes[0].lines  # the curve without a finite point is not drawn
    assert list(line.get_ydata()) == [1 / (s + 1) for s in range(9)]
    figure.savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert [axes.get_title() for axes in curves_figure([]).axes] == ["no metrics yet"]
