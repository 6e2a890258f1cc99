"""What float32 means."""

import torch


def exact_float32() -> None:
    """From now on float32 is float32 on GPUs: neither matmuls nor convolutions round their inputs to TF32's 10 bits.

    PyTorch leaves cuDNN's convolutions in TF32, so a float32 run would part from a CPU's in the third digit.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
