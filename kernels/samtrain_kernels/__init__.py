"""Operations of the SAM two-stream Q-Former that no library has. PyTorch reference implementations so far."""

from samtrain_kernels.image_mix.reference import image_mix_weights, mix_images

__all__ = ["image_mix_weights", "mix_images"]
