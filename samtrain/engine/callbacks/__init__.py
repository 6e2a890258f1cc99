"""Extras around the training loop: progress, metrics, utilization; others derive from `Callback`."""

from samtrain.engine.callbacks.base import Callback
from samtrain.engine.callbacks.metrics import Metrics
from samtrain.engine.callbacks.progress import Progress
from samtrain.engine.callbacks.utilization import Utilization

__all__ = ["Callback", "Metrics", "Progress", "Utilization"]
