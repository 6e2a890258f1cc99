"""Which implementation runs: decided once by the caller, logged once for each choice.

    triton        the hand-written kernels; a CUDA device, or Triton's interpreter (TRITON_INTERPRET=1) on the CPU
    reference     the same function in PyTorch, mixed in score space
    materialised  the contextual features are built, then ordinary attention reads them
    auto          triton where it can run; elsewhere materialised

The environment variable SAMTRAIN_KERNELS decides for `auto`; an argument other than `auto` wins over it.
"""

import functools
import importlib.util
import logging
import os
from typing import Literal, get_args

Backend = Literal["auto", "triton", "reference", "materialised"]
ResolvedBackend = Literal["triton", "reference", "materialised"]

ENVIRONMENT_VARIABLE = "SAMTRAIN_KERNELS"

logger = logging.getLogger("samtrain_kernels")


def resolve_backend(backend: Backend, *, device_type: str, attention_dropout: float = 0.0) -> ResolvedBackend:
    """The implementation to run on tensors of `device_type` ("cuda", "cpu").

    Args:
        attention_dropout: probability; above 0 the materialised path runs whatever was asked for, because dropout of
            attention probabilities exists there alone.

    Raises:
        ValueError: `backend` or SAMTRAIN_KERNELS is no backend.
        RuntimeError: `triton` was asked for and cannot run here; the message says what is missing.
    """
    asked, source = _asked(backend)
    if attention_dropout > 0:
        _log_once(f"kernels: materialised (attention dropout {attention_dropout:g} exists there alone), {source}")
        return "materialised"
    missing = _missing_for_triton(device_type)
    if asked == "triton" and missing is not None:
        raise RuntimeError(f"{source} asks for the Triton kernels on {device_type}, but {missing}")
    chosen: ResolvedBackend
    if asked == "auto":
        # Chosen by device alone: a CPU runs the interpreter only when asked to, it is a test tool.
        chosen = "triton" if device_type == "cuda" and missing is None else "materialised"
    else:
        chosen = asked
    because = f" ({missing})" if asked == "auto" and device_type == "cuda" and missing is not None else ""
    _log_once(f"kernels: {chosen} on {device_type}, {source}{because}")
    return chosen


def is_interpreted() -> bool:
    """True where Triton runs its kernels in its interpreter (read when a kernel's module is first imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def _asked(backend: str) -> tuple[Backend, str]:
    """The backend asked for, and by whom."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend {backend!r} is unknown; choose from {', '.join(get_args(Backend))}")
    from_environment = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if backend != "auto" or not from_environment:
        return backend, f"backend={backend!r}"  # type: ignore[return-value]
    if from_environment not in get_args(Backend):
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}={from_environment!r} is unknown; choose from {', '.join(get_args(Backend))}"
        )
    return from_environment, f"{ENVIRONMENT_VARIABLE}={from_environment}"  # type: ignore[return-value]


def _missing_for_triton(device_type: str) -> str | None:
    """Why the Triton kernels cannot run, or None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; install it or choose reference or materialised"
    if device_type != "cuda" and not is_interpreted():
        return (
            "they need a CUDA device; choose reference or materialised, or set TRITON_INTERPRET=1 to run them (slowly) "
            "in Triton's interpreter"
        )
    return None


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)
