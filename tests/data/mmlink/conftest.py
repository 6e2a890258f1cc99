"""Small real sources: drawn things in several poses, photographs with something in them, covers; and a chat server."""

import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

NAMES = (
    "ball", "cube", "cone", "ring", "star", "arrow", "cross", "heart", "moon", "leaf", "drop", "bell",
    "kite", "boat", "tent", "vase", "lamp", "fork", "comb", "drum", "sled", "flute", "crown", "shell",
)  # fmt: skip


def draw_thing(number: int, pose: int, *, side: int = 96, alpha: bool = True) -> Image.Image:
    """A polygon of its own shape and colour, turned from pose to pose, with a dot."""
    rng = np.random.default_rng(number)
    radii = rng.uniform(0.45, 1.0, size=int(rng.integers(5, 9)))
    colour = tuple(int(value) for value in rng.integers(0, 256, size=3))
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0) if alpha else (255, 255, 255, 255))
    turn = 0.9 * pose
    points = []
    for i, radius in enumerate(radii):
        angle = turn + 2 * math.pi * i / len(radii)
        reach = 0.46 * side * radius
        points.append((side / 2 + reach * math.cos(angle), side / 2 + reach * math.sin(angle)))
    pen = ImageDraw.Draw(image)
    pen.polygon(points, fill=(*colour, 255))
    dot = side / 2 + 8 * math.cos(turn), side / 2 + 8 * math.sin(turn)
    pen.ellipse((dot[0] - 6, dot[1] - 6, dot[0] + 6, dot[1] + 6), fill=(*(255 - c for c in colour), 255))
    return image if alpha else image.convert("RGB")


def draw_photograph(number: int, *, size: tuple[int, int] = (400, 300)) -> Image.Image:
    """Soft noise, as a background has it."""
    noise = np.random.default_rng(1000 + number).integers(60, 220, size=(6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def thing() -> Callable[..., Image.Image]:
    return draw_thing


@pytest.fixture(scope="session")
def photograph() -> Callable[..., Image.Image]:
    return draw_photograph


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """things/NAME/POSE.png, icons/NAME.png, photographs/NAME.jpg, covers/ with metadata; one file is damaged."""
    root = tmp_path_factory.mktemp("sources")
    for number, name in enumerate(NAMES):
        for pose in range(3):
            path = root / "things" / name / f"{pose}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_thing(number, pose).save(path)
        (root / "icons").mkdir(exist_ok=True)
        draw_thing(100 + number, 0, side=64).save(root / "icons" / f"{name}.png")
    (root / "things" / "ball" / "broken.png").write_bytes(b"no picture")
    (root / "photographs").mkdir()
    for number, name in enumerate(("green hills", "grey rocks", "blue lake", "dry field")):
        draw_photograph(number).save(root / "photographs" / f"{name.replace(' ', '-')}.jpg", quality=95)
    (root / "covers").mkdir()
    rows = []
    for number in range(12):
        draw_photograph(50 + number, size=(120, 180)).save(root / "covers" / f"{number}.png")
        rows.append(
            {"file": f"{number}.png", "title": f"Book {number}", "author": f"Writer {number % 4}", "genre": "play"}
        )
    (root / "covers" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def values(sources: Path, tmp_path: Path) -> dict[str, Any]:
    """A configuration as YAML gives it; changed by tests."""
    return {
        "output": str(tmp_path / "set"),
        "work": str(tmp_path / "work"),
        "num_samples": 16,
        "domains": {"objects": 0.5, "icons": 0.25, "covers": 0.25},
        "splits": {"train": 0.7, "validation": 0.0, "test": 0.3},
        "sources": [
            {"kind": "folder", "path": str(sources / "things"), "category": "shape"},
            {"kind": "folder", "path": str(sources / "icons"), "role": "icon"},
            {"kind": "folder", "path": str(sources / "photographs"), "role": "background"},
            {"kind": "folder", "path": str(sources / "covers"), "role": "cover", "licence": "CC0-1.0"},
        ],
        "segment": {"kind": "alpha"},
        "plates": {"remove": False},
        "compose": {"canvas": 96, "grid": [2, 2]},
        "fill": {"kind": "telea"},
        "filters": {"pose_bits": None},
        "execution": {"backend": "local"},
    }


Response = tuple[int, dict[str, str], bytes]
Behaviour = Callable[[dict[str, Any]], Response]


def says(text: str, *, usage: tuple[float, float] | None = (20, 5)) -> Behaviour:
    """A completion."""

    def answer(request: dict[str, Any]) -> Response:
        body: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": text}}]}
        if usage is not None:
            body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
        return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()

    return answer


def returns(status: int, body: str = "", **headers: str) -> Behaviour:
    """Any response; `Retry_After="1"` becomes the header Retry-After."""

    def answer(request: dict[str, Any]) -> Response:
        return status, {name.replace("_", "-"): value for name, value in headers.items()}, body.encode()

    return answer


class ChatServer:
    """A real HTTP server that speaks chat completions. `script`: behaviours of the next requests, then `otherwise`."""

    says = staticmethod(says)
    returns = staticmethod(returns)

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.script: list[Behaviour] = []
        self.otherwise: Behaviour = says("a quiet place")
        self.lock = threading.Lock()
        chat = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with chat.lock:
                    chat.requests.append(body)
                    chat.headers.append({**self.headers, "path": self.path})
                    behaviour = chat.script.pop(0) if chat.script else chat.otherwise
                status, headers, content = behaviour(body)
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:  # the client did not wait
                    self.close_connection = True

            def log_message(self, *args: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("MMLINK_TEST_KEY", "secret-key")
    server = ChatServer()
    yield server
    server.server.shutdown()
    server.server.server_close()
