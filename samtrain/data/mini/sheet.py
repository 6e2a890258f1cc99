"""The shared contact sheet, under the name this package knows it by."""

from samtrain.data.sheet import contact_sheet

__all__ = ["contact_sheet"]
