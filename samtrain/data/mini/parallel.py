"""The shared map over processes, under the name this package knows it by."""

from samtrain.data.parallel import available_cores, ordered_map

__all__ = ["available_cores", "ordered_map"]
