"""One logger for all of samtrain; configured by entry points, never at import."""

import logging

logger = logging.getLogger("samtrain")


def configure_logging(*, rank: int = 0, level: int = logging.INFO) -> None:
    """Log to stderr with the rank in front; ranks other than 0 only from WARNING up."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s [rank {rank}] %(message)s", "%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(level if rank == 0 else max(level, logging.WARNING))
    logger.propagate = False
