"""Tell transformers' Auto classes about our model types."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from samtrain.model.configuration import SamMllmConfig
from samtrain.model.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel
from samtrain.model.modeling import SamMllmForConditionalGeneration
from samtrain.model.processing import SamMllmProcessor


def register() -> None:
    """Make AutoConfig, AutoModelForImageTextToText and AutoProcessor load `sam_mllm` folders; may be repeated."""
    AutoConfig.register("sam_mllm", SamMllmConfig, exist_ok=True)
    AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)
    AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
    AutoModelForImageTextToText.register(SamMllmConfig, SamMllmForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(SamMllmConfig, SamMllmProcessor, exist_ok=True)
