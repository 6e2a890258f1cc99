"""One logger for all of samtrain; configured, with the kernels' own, by entry points, never at import."""

import logging

logger = logging.getLogger("samtrain")


def configure_logging(*, rank: int = 0, level: int = logging.INFO) -> None:
    """Log to stderr with the rank in front; ranks other than 0 only from WARNING up."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s [rank {rank}] %(message)s", "%H:%M:%S"))
    for one in (logger, logging.getLogger("samtrain_kernels")):
        one.handlers[:] = [handler]
        one.setLevel(level if rank == 0 else max(level, logging.WARNING))
        one.propagate = False
