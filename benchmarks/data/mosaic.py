"""MosaicML Streaming without torchvision, which has no CPU build: only its ready-made vision datasets need it."""

import importlib.util
import sys
from types import ModuleType
from typing import Any

_STAND_INS = {"torchvision.datasets": "VisionDataset", "torchvision.transforms.functional": "to_tensor"}


def import_streaming() -> Any:
    """The package `streaming`; where torchvision is missing, empty stand-ins of what it imports are there meanwhile."""
    if "streaming" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        import streaming

        return streaming
    import transformers  # noqa: F401  which asks for torchvision too, and must not find a stand-in

    names = {".".join(name.split(".")[:n]) for name in _STAND_INS for n in range(1, name.count(".") + 2)}
    sys.modules.update({name: ModuleType(name) for name in names})
    for name, attribute in _STAND_INS.items():
        setattr(sys.modules[name], attribute, type(attribute, (), {}))
    try:
        import streaming
    finally:
        for name in names:
            del sys.modules[name]
    return streaming
