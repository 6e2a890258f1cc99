"""The switch `model.liger`: Liger's Triton kernels for the norms, rotary embedding and gated MLP of the language model.

    true    on a GPU, with an architecture that Liger knows; refused elsewhere
    false   transformers' own modules
    auto    true where that is possible

Liger exchanges the forward of modules that exist; parameters and their names stay, so nothing that is saved holds it.
Its fused loss is left alone: our logits exist at label positions only. No GPU has run this yet; tests run Liger's
kernels in Triton's interpreter.
"""

import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from samtrain.core.errors import ConfigError
from samtrain.core.log import logger

Choice = bool | Literal["auto"]


def choose_liger(asked: Choice, text_config: PretrainedConfig, *, device_type: str) -> tuple[bool, str]:
    """Whether Liger's kernels run on `device_type` ("cuda", "cpu"), and why, in words.

    Raises:
        ConfigError: they are asked for and cannot run.
    """
    because = "model.liger: false" if asked is False else _missing(text_config.model_type, device_type=device_type)
    if because is None:
        return True, f"liger-kernel {importlib.metadata.version('liger-kernel')} for {text_config.model_type}"
    if asked is True:
        raise ConfigError(f"model.liger is true, but {because}; install or change that, or set it to auto")
    return False, f"off: {because}"


def apply_liger(language_model: PreTrainedModel) -> None:
    """Let norms and gated MLPs of this model, and the rotary embedding of its architecture, run Liger's kernels.

    Liger also exchanges classes in transformers' module, which would reach every model that is made later, an exported
    one among them: that is undone. The rotary embedding is a function of that module; on a CPU it stays transformers'.

    Raises:
        ConfigError: this Liger and this transformers do not fit.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    home = sys.modules[type(language_model).__module__]
    before = dict(vars(home))
    try:
        _apply_liger_kernel_to_instance(
            model=language_model,
            rope=True,
            rms_norm=True,
            swiglu=True,
            cross_entropy=False,
            fused_linear_cross_entropy=False,
        )
    except Exception as error:
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("liger-kernel", "transformers"))
        raise ConfigError(f"model.liger: {versions} do not fit: {error}; set model.liger=false") from error
    for name, own in before.items():
        theirs = getattr(home, name)
        if theirs is not own:
            setattr(home, name, own if isinstance(own, type) else _on_gpus(theirs, own))
    logger.debug("liger: %d modules", sum(map(runs_liger, language_model.modules())))


def runs_liger(module: nn.Module) -> bool:
    """True where this module's own forward was exchanged."""
    forward = vars(module).get("forward")
    return forward is not None and str(getattr(forward, "__module__", "")).startswith("liger_kernel.")


def _on_gpus(theirs: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    original = getattr(own, "transformers_own", own)  # of a model that was given Liger before

    @functools.wraps(original)
    def chosen(states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (theirs if states.device.type == "cuda" else original)(states, *args, **kwargs)

    chosen.transformers_own = original  # type: ignore[attr-defined]
    return chosen


def _missing(model_type: str, *, device_type: str) -> str | None:
    """Why Liger's kernels cannot run, or None where they can."""
    if device_type != "cuda":
        return f"its kernels need a GPU and this runs on {device_type}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install 'samtrain[gpu]')"
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except Exception as error:  # whatever a version that does not fit raises while it is imported
        return f"liger-kernel cannot be imported ({error})"
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"Liger has no kernels for {model_type}"
    return None
