"""The SAM multi-image model. Its public names load on first use (transformers takes seconds to import), and loading one
registers the model with transformers' Auto classes; `register()` does only that."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samtrain.model.build import LoadReport, build_model, build_processor
    from samtrain.model.configuration import SamMllmConfig
    from samtrain.model.modeling import SamMllmForConditionalGeneration, SamMllmOutput
    from samtrain.model.processing import SamMllmProcessor

_HOMES = {
    "LoadReport": "build",
    "build_model": "build",
    "build_processor": "build",
    "SamMllmConfig": "configuration",
    "SamMllmForConditionalGeneration": "modeling",
    "SamMllmOutput": "modeling",
    "SamMllmProcessor": "processing",
}
__all__ = [
    "LoadReport",
    "SamMllmConfig",
    "SamMllmForConditionalGeneration",
    "SamMllmOutput",
    "SamMllmProcessor",
    "build_model",
    "build_processor",
    "register",
]


def register() -> None:
    """Make transformers' AutoConfig, AutoModelForImageTextToText and AutoProcessor load our folders."""
    from samtrain.model import registration

    registration.register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    register()
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
