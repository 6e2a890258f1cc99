"""The command line as users meet it: exit status, what stands on stdout and on stderr."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from samtrain.launch.cli import main
from samtrain.recipe import load_recipe


def test_a_finished_run_exits_0_and_ends_with_its_summary(
    stand_ins: ModuleType, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_recipe), "--local", "seed=7"], worker=stand_ins.all_reduce) == 0
    out, err = capsys.readouterr()
    assert out.index("plan") < out.index("sum 3.0") < out.index("tiny: finished")
    assert err == ""
    assert load_recipe(tmp_path / "run" / "recipe.yaml").seed == 7


def test_a_bad_recipe_exits_2_with_one_message(tiny_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_recipe), "--local", "train.max_step=3"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("samtrain: ") and "did you mean `max_steps`" in err and "Traceback" not in err


def test_bad_input_found_by_a_worker_exits_2_without_a_traceback(
    stand_ins: ModuleType, tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_recipe), "--local"], worker=stand_ins.bad_input) == 2
    err = capsys.readouterr().err
    assert "data.path: nothing is there" in err and "Traceback" not in err


def test_a_failure_exits_1_with_the_first_traceback_alone(
    stand_ins: ModuleType, tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_recipe), "--local"], worker=stand_ins.second_rank_fails_first) == 1
    err = capsys.readouterr().err
    assert err.count("Traceback") == 1 and "ValueError: the true cause" in err and "lost connection" not in err


def test_dry_run_shows_the_plan_and_starts_nothing(
    stand_ins: ModuleType, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_recipe), "--dry-run"], worker=stand_ins.bad_input) == 0
    assert "largest sample" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_triton_kernels_without_a_gpu_exit_2_and_say_what_is_missing(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = ["model.kernels=triton", "model.train.qformer=false", "launch.device=cpu"]
    assert main([str(tiny_recipe), "--local", "--dry-run", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("samtrain: model.kernels: ") and "choose reference or materialised" in err


def test_print_config_prints_a_recipe_that_reads_back(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_recipe), "--print-config", "train.learning_rate=1e-7"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(tmp_path / "printed.yaml") == load_recipe(tiny_recipe, ["train.learning_rate=1e-7"])


def test_sigterm_to_the_launcher_exits_143(
    stand_ins: ModuleType, tiny_recipe: Path, write_script: Callable[[str], Path]
) -> None:
    script = write_script(
        """
        import sys
        import samtrain_stand_ins
        from samtrain.launch.cli import main

        if __name__ == "__main__":
            sys.exit(main(sys.argv[1:], worker=samtrain_stand_ins.train_until_stopped))
        """
    )
    command = [sys.executable, str(script), str(tiny_recipe), "--local"]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    for line in launcher.stdout:
        if line == "training\n":
            launcher.send_signal(signal.SIGTERM)
            break
    out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 143
    assert "save a checkpoint" in out and "saved checkpoint-7" in err and "Traceback" not in err


def test_the_real_worker_trains_and_is_resumable_from_its_sigterm(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m samtrain.launch` as it is, with two real processes."""
    launch = [sys.executable, "-m", "samtrain.launch", str(tiny_recipe), "--local"]
    long = ["train.max_steps=400", "evaluation.splits=[]", "tracking.log_model=false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([*launch, *long], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("step "):
            run.send_signal(signal.SIGTERM)
            break
    out, err = run.communicate(timeout=200)
    assert run.returncode == 143, out + err
    assert list((tmp_path / "run").glob("checkpoint-*/COMPLETE")), out + err
    assert main([*launch[3:], *long, "--dry-run"]) == 0
    assert "resumes from" in capsys.readouterr().out
    assert main([*launch[3:], "--dry-run"]) == 2
    assert "train.max_steps: 400 -> 2" in capsys.readouterr().err
