"""Operations of the SAM two-stream Q-Former that no library has."""

from samtrain_kernels.context_attention import context_attention
from samtrain_kernels.dispatch import Backend, resolve_backend
from samtrain_kernels.image_mix import image_mix_weights, mix_images
from samtrain_kernels.tables import ImageTables

__all__ = ["Backend", "ImageTables", "context_attention", "image_mix_weights", "mix_images", "resolve_backend"]
