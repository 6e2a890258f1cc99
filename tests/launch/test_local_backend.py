import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from samtrain.core.errors import Terminated
from samtrain.launch.failures import WorkersFailed
from samtrain.launch.local_backend import run_local
from samtrain.launch.stop_request import StopRequest
from samtrain.recipe import Recipe

MakeRecipe = Callable[..., Recipe]


def test_two_processes_get_their_ranks_and_only_rank_0_is_heard(
    stand_ins: ModuleType, make_recipe: MakeRecipe, stop: StopRequest
) -> None:
    events: list[dict[str, Any]] = []
    summary = run_local(make_recipe(), emit=events.append, stop=stop, worker=stand_ins.succeed)
    environment = summary["environment"]
    assert (environment["RANK"], environment["LOCAL_RANK"], environment["WORLD_SIZE"]) == ("0", "0", "2")
    assert environment["MASTER_ADDR"] == "127.0.0.1"
    assert [event["step"] for event in events] == [1, 2, 3]


def test_the_two_processes_form_a_process_group(
    stand_ins: ModuleType, make_recipe: MakeRecipe, stop: StopRequest
) -> None:
    events: list[dict[str, Any]] = []
    summary = run_local(make_recipe(), emit=events.append, stop=stop, worker=stand_ins.all_reduce)
    assert summary["summary_rows"] == [["sum", 3.0]]
    assert [event["text"] for event in events] == ["sum 3.0"]


def test_the_first_failure_is_the_one_that_surfaces(
    stand_ins: ModuleType, make_recipe: MakeRecipe, stop: StopRequest
) -> None:
    with pytest.raises(WorkersFailed) as caught:
        run_local(make_recipe(), emit=print, stop=stop, worker=stand_ins.second_rank_fails_first)
    failure = caught.value.failure
    assert (failure.rank, failure.kind, failure.message) == (1, "ValueError", "the true cause")
    assert "second_rank_fails_first" in failure.traceback
    assert caught.value.exit_code == 1


def test_an_input_error_in_a_worker_keeps_its_message_and_exit_code_and_is_not_retried(
    stand_ins: ModuleType, make_recipe: MakeRecipe, stop: StopRequest
) -> None:
    events: list[dict[str, Any]] = []
    with pytest.raises(WorkersFailed) as caught:
        run_local(make_recipe(max_failures=3), emit=events.append, stop=stop, worker=stand_ins.bad_input)
    assert caught.value.exit_code == 2
    assert caught.value.failure.message == "data.path: nothing is there"
    assert events == []


def test_a_killed_worker_is_named_before_the_lost_connection_of_its_peer(
    stand_ins: ModuleType, make_recipe: MakeRecipe, stop: StopRequest
) -> None:
    with pytest.raises(WorkersFailed) as caught:
        run_local(make_recipe(), emit=print, stop=stop, worker=stand_ins.second_rank_is_killed)
    assert caught.value.failure.rank == 1
    assert "SIGKILL" in caught.value.failure.message


def test_a_rank_that_hangs_after_anothers_failure_is_killed(
    stand_ins: ModuleType, make_recipe: MakeRecipe, stop: StopRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("samtrain.launch.local_backend._REPORT_SECONDS", 1.0)
    with pytest.raises(WorkersFailed) as caught:
        run_local(make_recipe(), emit=print, stop=stop, worker=stand_ins.second_rank_hangs)
    assert caught.value.failure.message == "rank 0 fails, rank 1 hangs"
    assert [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())] == []


def test_a_failed_attempt_is_repeated_from_its_checkpoint(
    stand_ins: ModuleType, make_recipe: MakeRecipe, stop: StopRequest
) -> None:
    events: list[dict[str, Any]] = []
    recipe = make_recipe(max_failures=1)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"resume_from_checkpoint": None})})
    summary = run_local(recipe, emit=events.append, stop=stop, worker=stand_ins.fail_once)
    assert summary["summary_rows"] == [["resume", "auto"]]
    assert [event["level"] for event in events] == ["warning"]
    assert "a lost disk" in events[0]["text"] and "restart 1 of 1" in events[0]["text"]


def test_sigterm_reaches_the_workers_which_end_as_terminated(
    stand_ins: ModuleType, make_recipe: MakeRecipe, stop: StopRequest
) -> None:
    def stop_once_training(event: dict[str, Any]) -> None:
        if event.get("text") == "training":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated, match="saved checkpoint-7"):
        run_local(make_recipe(), emit=stop_once_training, stop=stop, worker=stand_ins.train_until_stopped)


def test_sigterm_while_workers_start_is_not_lost_and_kills_none(
    stand_ins: ModuleType, make_recipe: MakeRecipe, stop: StopRequest
) -> None:
    """They have no handler yet for a second or so; the signal waits for it."""
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Terminated, match="saved checkpoint-7"):
        run_local(make_recipe(), emit=lambda event: None, stop=stop, worker=stand_ins.train_until_stopped)


def test_workers_end_when_their_launcher_is_killed(stand_ins: ModuleType, write_script: Callable[[str], Path]) -> None:
    import subprocess
    import sys

    script = write_script(
        """
        import samtrain_stand_ins
        from samtrain.launch.local_backend import run_local
        from samtrain.launch.stop_request import StopRequest
        from samtrain.recipe import Recipe

        if __name__ == "__main__":
            launch = {"num_workers": 2, "device": "cpu"}
            recipe = Recipe.model_validate({"name": "x", "output_dir": "x", "launch": launch, "data": {"path": "x"}})
            show = lambda event: print(event["text"], flush=True)
            run_local(recipe, emit=show, stop=StopRequest(), worker=samtrain_stand_ins.train_until_stopped)
        """
    )
    launcher = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None and launcher.stdout.readline() == "training\n"
    workers = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    launcher.wait()
    gone, alive = psutil.wait_procs(workers, timeout=20)
    for process in alive:
        process.kill()
    assert alive == [] and len(gone) >= 2


def test_a_second_signal_ends_workers_that_do_not_listen(
    stand_ins: ModuleType, make_recipe: MakeRecipe, stop: StopRequest
) -> None:
    def interrupt() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.0)

    def interrupt_once_training(event: dict[str, Any]) -> None:
        if event.get("text") == "training":
            threading.Thread(target=interrupt).start()

    with pytest.raises(Terminated, match="before it could save"):
        run_local(make_recipe(), emit=interrupt_once_training, stop=stop, worker=stand_ins.deaf)
