"""Host memory that does not creep: freed blocks go back to the operating system."""

import ctypes
import sys

BLOCK_BYTES = 1024**2
_KEPT_BYTES = 16 * 1024**2
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def return_freed_blocks() -> bool:
    """From now on, blocks of BLOCK_BYTES and more are mappings of their own; whether this C library can.

    glibc raises that bound to 32 MiB when a large block is first freed. Pictures and batches of ever other sizes, freed
    by many threads, then leave holes in its heaps: a loader grew by 1.5 kB an image, and took a third more at its peak.
    Not for training on CPUs, whose activations would be mapped and unmapped all the time.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, BLOCK_BYTES) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
