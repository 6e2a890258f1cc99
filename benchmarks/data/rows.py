"""What is compared: the rows of the loading table, in order."""

from dataclasses import dataclass
from typing import Literal

Family = Literal["ours", "peer", "mixed"]


@dataclass(frozen=True)
class Row:
    """family: `mixed` explains ours and is no peer. processes: 1, or more than 1 for one on each core, a rank each.

    requires: packages it cannot be without.
    """

    label: str
    family: Family
    loader: str
    square: str
    requires: tuple[str, ...] = ()
    processes: int = 1
    settings: str = ""


_WORKERS = "worker processes, prefetch 2, persistent workers"
_WEBDATASET = f"WebLoader: {_WORKERS}; shards and 200 samples shuffled; batched in workers"
_STREAMING = f"StreamingDataLoader: {_WORKERS}; local MDS, py1e shuffle; bytes columns"
_LITDATA = f"StreamingDataLoader: {_WORKERS}; local chunks, shuffled; bytes fields, `transform` decodes"


def _peer(label: str, loader: str, square: str, settings: str) -> Row:
    decoding = {"pil": "PIL decode, bicubic", "cv2": "OpenCV decode, INTER_AREA"}[square]
    requires = (loader, "cv2") if square == "cv2" else (loader,)
    return Row(f"{label}, {decoding}", "peer", loader, square, requires, settings=settings)


ROWS: dict[str, Row] = {
    "ours": Row("ours", "ours", "ours", "reduced", settings="threads, 2 steps ahead; text encoded, packed, checked"),
    "ours_full": Row("ours, decoded in full", "ours", "ours", "full", settings="data.reduced_decode: false"),
    "ours_processes": Row(
        "ours, processes of one thread", "ours", "ours", "reduced", processes=2, settings="a rank each"
    ),
    "webdataset_pil": _peer("webdataset", "webdataset", "pil", _WEBDATASET),
    "webdataset_cv2": _peer("webdataset", "webdataset", "cv2", _WEBDATASET),
    "streaming_pil": _peer("MosaicML Streaming", "streaming", "pil", _STREAMING),
    "streaming_cv2": _peer("MosaicML Streaming", "streaming", "cv2", _STREAMING),
    "litdata_pil": _peer("LitData", "litdata", "pil", _LITDATA),
    "litdata_cv2": _peer("LitData", "litdata", "cv2", _LITDATA),
    "webdataset_ours": Row(
        "webdataset, our decoding", "mixed", "webdataset", "ours", ("webdataset",), settings=_WEBDATASET
    ),
}

# One row of each library for what hardly depends on decoding: memory and resuming.
REPRESENTATIVES = ("ours", "webdataset_cv2", "streaming_cv2", "litdata_cv2")
