"""Extras around the training loop: progress, metrics; others derive from `Callback`."""

from samtrain.engine.callbacks.base import Callback
from samtrain.engine.callbacks.metrics import Metrics
from samtrain.engine.callbacks.progress import Progress

__all__ = ["Callback", "Metrics", "Progress"]
