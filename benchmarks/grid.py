"""Tables as text."""

from collections.abc import Collection, Sequence


def grid(lines: Sequence[Sequence[str]], *, left: Collection[int] | None = None) -> str:
    """Lines of equally many cells, columns aligned: those numbered in `left` to the left, others to the right.

    Args:
        left: negative numbers count from the last column; None: all of them.
    """
    count = len(lines[0])
    lefts = range(count) if left is None else {i % count for i in left}
    widths = [max(len(line[i]) for line in lines) for i in range(count)]

    def cell(i: int, text: str) -> str:
        return text.ljust(widths[i]) if i in lefts else text.rjust(widths[i])

    return "\n".join("  ".join(cell(i, text) for i, text in enumerate(line)).rstrip() for line in lines)
