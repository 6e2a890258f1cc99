"""What a run tells the person who watches it: small dictionaries that travel from rank 0 to the launcher.

kinds: "plan" (title, rows: [[name, value], ...]); "message" (level: info|warning, text);
"step" (step, max_steps, metrics: name -> float, eta_seconds); "progress" (what, done, total);
"eval" (title, columns, rows); "summary" (title, rows: [[name, value], ...]).
"""

from collections.abc import Callable
from typing import Any

Event = dict[str, Any]
Emit = Callable[[Event], None]


def discard(event: Event) -> None:
    """An `Emit` for ranks nobody watches."""


def message(text: str, *, level: str = "info") -> Event:
    return {"kind": "message", "level": level, "text": text}
