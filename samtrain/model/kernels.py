"""The switch `model.kernels`: which implementation the W stream's attention to its context runs.

    triton        our kernels (CUDA, or Triton's interpreter)    } keys and values of the raw features, scores mixed;
    reference     the same mathematics in PyTorch                } no contextual feature is built
    materialised  contextual features are built and projected; the only one with attention dropout
    auto          what `samtrain_kernels` prefers on the device (SAMTRAIN_KERNELS decides for it)

All compute the same function. The choice belongs to a process, not to a model: it is never saved with one.
"""

import functools

from samtrain_kernels import Backend, resolve_backend
from samtrain_kernels.dispatch import ResolvedBackend
from transformers import InstructBlipQFormerConfig

from samtrain.core.errors import ConfigError
from samtrain.core.log import logger


def choose_kernels(
    kernels: Backend, qformer: InstructBlipQFormerConfig, *, device_type: str, qformer_trains: bool
) -> ResolvedBackend:
    """What runs on `device_type` ("cuda", "cpu").

    Args:
        qformer_trains: its attention dropout acts then; a frozen Q-Former stays in eval mode.

    Raises:
        ConfigError: the one asked for cannot run here, or SAMTRAIN_KERNELS names none.
    """
    dropout = qformer.attention_probs_dropout_prob if qformer_trains else 0.0
    try:
        chosen = resolve_backend(kernels, device_type=device_type, attention_dropout=dropout)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"model.kernels: {error}") from None
    width = qformer.hidden_size // qformer.num_attention_heads
    if chosen == "triton" and (width < 16 or width & (width - 1)):
        text = f"the Q-Former's heads are {width} wide; the Triton kernels want a power of two, at least 16"
        if kernels == "triton":
            raise ConfigError(f"model.kernels: {text}. Choose reference or materialised")
        _warn_once(f"kernels: materialised, because {text}")
        return "materialised"
    return chosen


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning(text)
