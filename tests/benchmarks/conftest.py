"""Without a GPU our kernels run in Triton's interpreter here, as in tests/kernels."""

import os

import torch

# Read by Triton when a module with kernels is first imported, so before any of them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
