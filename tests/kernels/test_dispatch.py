"""Which backend runs, and what is said where it cannot."""

import importlib.util
import logging
import subprocess
import sys
from typing import Any

import pytest
from samtrain_kernels import dispatch, resolve_backend


@pytest.fixture(autouse=True)
def _plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment variable decides, and every choice is logged anew."""
    for name in (dispatch.ENVIRONMENT_VARIABLE, "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    dispatch._log_once.cache_clear()


def _without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
    )


def test_auto_takes_triton_on_cuda_and_materialised_on_a_cpu() -> None:
    assert resolve_backend("auto", device_type="cuda") == "triton"
    assert resolve_backend("auto", device_type="cpu") == "materialised"


def test_auto_does_not_run_the_interpreter_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("auto", device_type="cpu") == "materialised"
    assert resolve_backend("triton", device_type="cpu") == "triton"


def test_auto_without_triton_falls_back_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _without_triton(monkeypatch)
    with caplog.at_level(logging.INFO, "samtrain_kernels"):
        assert resolve_backend("auto", device_type="cuda") == "materialised"
    assert "triton is not installed" in caplog.text


@pytest.mark.parametrize("backend", ["reference", "materialised"])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_what_needs_nothing_runs_everywhere(backend: Any, device_type: str) -> None:
    assert resolve_backend(backend, device_type=device_type) == backend


def test_triton_on_a_cpu_is_refused_with_the_ways_out() -> None:
    with pytest.raises(RuntimeError, match=r"need a CUDA device; choose reference .* or set TRITON_INTERPRET=1"):
        resolve_backend("triton", device_type="cpu")


def test_triton_without_the_package_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_triton(monkeypatch)
    with pytest.raises(RuntimeError, match="the package triton is not installed"):
        resolve_backend("triton", device_type="cuda")


def test_the_environment_decides_for_auto_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMTRAIN_KERNELS", "reference")
    assert resolve_backend("auto", device_type="cuda") == "reference"
    assert resolve_backend("triton", device_type="cuda") == "triton"
    monkeypatch.setenv("SAMTRAIN_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="SAMTRAIN_KERNELS=triton asks for"):
        resolve_backend("auto", device_type="cpu")


def test_unknown_names_are_refused_whoever_says_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"backend .flash. is unknown; choose from auto, triton, reference"):
        resolve_backend("flash", device_type="cpu")  # type: ignore[arg-type]
    monkeypatch.setenv("SAMTRAIN_KERNELS", "fast")
    with pytest.raises(ValueError, match="SAMTRAIN_KERNELS='fast' is unknown"):
        resolve_backend("auto", device_type="cpu")


@pytest.mark.parametrize("backend", ["auto", "triton", "reference", "materialised"])
def test_dropout_of_attention_means_materialised(backend: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "samtrain_kernels"):
        assert resolve_backend(backend, device_type="cuda", attention_dropout=0.1) == "materialised"
    assert "attention dropout 0.1" in caplog.text


def test_a_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "samtrain_kernels"):
        for _ in range(3):
            resolve_backend("auto", device_type="cpu")
        resolve_backend("reference", device_type="cpu")
    messages = [record.message for record in caplog.records]
    assert messages == [
        "kernels: materialised on cpu, backend='auto'",
        "kernels: reference on cpu, backend='reference'",
    ]


def test_a_machine_without_triton_runs_the_other_backends() -> None:
    """In a process where `import triton` fails."""
    program = """
import sys
sys.modules["triton"] = None  # any import of it raises
import torch, samtrain_kernels
from samtrain_kernels import image_mix_weights
from samtrain.core.batch import ImageGroups
features = torch.randn(3, 4, 8)
weights = image_mix_weights(features, torch.randn(8), None, ImageGroups.from_counts([3]), context="others")
print(tuple(weights.shape), [name for name in sys.modules if name.startswith("triton.")])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "(3, 3, 4) []"
