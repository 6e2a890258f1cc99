import os
import signal
import threading
from collections.abc import Iterator

import pytest

from samtrain.core.stopping import clear_stop, request_stop, stop_on_sigterm, stop_requested


@pytest.fixture(autouse=True)
def leave_no_trace() -> Iterator[None]:
    previous = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, previous)
    clear_stop()


def test_sigterm_sets_the_flag() -> None:
    stop_on_sigterm()
    assert not stop_requested()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop_requested()


def test_a_request_from_another_thread_is_seen_and_can_be_forgotten() -> None:
    thread = threading.Thread(target=request_stop)
    thread.start()
    thread.join()
    assert stop_requested()
    clear_stop()
    assert not stop_requested()


def test_outside_the_main_thread_handlers_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=stop_on_sigterm)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
