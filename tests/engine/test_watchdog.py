import subprocess
import sys
import time

from samtrain.engine.watchdog import Watchdog

HANGING = """
import threading, sys
from samtrain.engine.watchdog import Watchdog
def waits_for_a_peer_that_never_comes():
    threading.Event().wait()
with Watchdog(output_dir=sys.argv[1], rank=3, timeout_seconds=0.5) as watchdog:
    watchdog.enter("data", step=6)
    watchdog.enter("forward", step=7, keys=("page-12", "page-13"))
    waits_for_a_peer_that_never_comes()
"""


def test_hanging_process_names_rank_phase_step_keys_and_line_and_ends_with_1(tmp_path):
    process = subprocess.run([sys.executable, "-c", HANGING, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert process.returncode == 1
    report = (tmp_path / "hang-rank3.txt").read_text()
    assert "rank 3 hangs: phase `forward` of step 7" in report
    assert "page-12, page-13" in report
    assert "waits_for_a_peer_that_never_comes" in report
    assert report in process.stderr


def test_report_reaches_stderr_where_the_folder_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "below")
    process = subprocess.run([sys.executable, "-c", HANGING, folder], capture_output=True, text=True, timeout=60)
    assert process.returncode == 1 and "phase `forward` of step 7" in process.stderr


def test_short_phases_rests_and_the_end_are_no_hangs(tmp_path):
    with Watchdog(output_dir=tmp_path, rank=0, timeout_seconds=0.4) as watchdog:
        for step in range(6):
            watchdog.enter("forward", step=step)
            time.sleep(0.1)
        watchdog.rest()
        time.sleep(0.8)
    watchdog.enter("forward", step=9)
    time.sleep(0.8)
    assert not list(tmp_path.iterdir())
