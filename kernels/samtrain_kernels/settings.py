"""Tile sizes of the kernels: what may be chosen, and what ships for each GPU.

There is no autotuning at run time: settings are files of this package, so every rank reads the same ones and no step is
ever slow because of a new length. A file `configs/<gpu>.json` (`nvidia_h200.json`, tuned on that GPU) wins over
`configs/sm_<capability>.json` (defaults chosen from compile tables), row by row. A row is found by kernel, head width,
dtype and a bucket of the number of images, never by a length.

A file reads

    {"gpu": "sm_90", "tuned": false, "how": "...", "settings": [
      {"kernel": "context_forward", "head_dim": 64, "dtype": "bfloat16", "images": "any",
       "images_per_block": 2, "block_patches": 64, "num_warps": 4, "num_stages": 2},
      {"kernel": "patch_logits", "dtype": "bfloat16",
       "block_rows": 8, "block_columns": 256, "num_warps": 4, "num_stages": 2}]}

and, where `tuned` is true, a `measured` object as well (GPU, capability [9, 0], driver, versions, commit).
"""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, overload

import torch

ContextKernel = Literal["context_forward", "context_backward", "context_kv_grad"]
PatchKernel = Literal["patch_logits", "patch_logits_grad"]
CONTEXT_KERNELS: tuple[str, ...] = get_args(ContextKernel)
PATCH_KERNELS: tuple[str, ...] = get_args(PatchKernel)

_ROOT = Path(__file__).parent
_FOLDERS = dict.fromkeys(CONTEXT_KERNELS, "context_attention") | dict.fromkeys(PATCH_KERNELS, "image_mix")

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)}
ANY_IMAGES = "any"
IMAGE_BUCKETS = {"1-2": 2, "3-4": 4, "5-6": 6, "7+": None}
"""Name of a bucket -> the largest number of images in it."""

DEFAULT_CAPABILITIES = ((8, 0), (9, 0))
"""Compute capabilities with a file of defaults, ascending. A GPU takes the highest one that is not above its own."""


@dataclass(frozen=True)
class KernelSetting:
    """Tiles of a context kernel: contexts handled by one program (they share keys and values), patches per tile."""

    images_per_block: int
    block_patches: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of a Triton launch."""
        return _options(self.num_warps, self.num_stages)


@dataclass(frozen=True)
class PatchSetting:
    """Tiles of a patch kernel: rows (image, patch) and columns (feature width) of one tile."""

    block_rows: int
    block_columns: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of a Triton launch."""
        return _options(self.num_warps, self.num_stages)


def _options(num_warps: int, num_stages: int) -> dict[str, Any]:
    # Said and not left to the default, which is on up to Triton 3.9 and off from 3.10.
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


class SettingError(ValueError):
    """A settings file is wrong, or no setting exists for what was asked."""


def _context_space(*rows: tuple[int, int, int, int]) -> tuple[KernelSetting, ...]:
    return tuple(KernelSetting(*row) for row in rows)


# What a tuner may try on each chip, for head widths up to 64 in 16 bits. A setting that spills registers in any variant
# of its kernel is not here: `python -m benchmarks.aot --search` shows which do, benchmarks/results/aot.txt keeps it.
_PATCH_SPACE: dict[str, tuple[PatchSetting, ...]] = {
    "patch_logits": (
        *(PatchSetting(rows, columns, 4, 2) for rows in (4, 8, 16) for columns in (128, 256)),
        PatchSetting(8, 256, 4, 3),
        PatchSetting(16, 256, 4, 3),
    ),
    "patch_logits_grad": (
        *(PatchSetting(rows, columns, 4, 2) for rows in (8, 16, 32) for columns in (128, 256)),
        PatchSetting(16, 128, 4, 3),
        PatchSetting(32, 128, 4, 3),
    ),
}

SEARCH_SPACES: Mapping[tuple[int, int], Mapping[str, tuple[KernelSetting | PatchSetting, ...]]] = {
    (8, 0): {
        "context_forward": _context_space(
            (1, 32, 4, 2), (1, 64, 4, 2), (1, 64, 8, 2), (2, 32, 8, 2), (2, 64, 8, 2),
        ),
        "context_backward": _context_space((1, 32, 4, 2), (1, 32, 8, 2), (2, 32, 8, 2)),
        "context_kv_grad": _context_space((1, 32, 4, 2), (1, 64, 4, 2), (1, 64, 8, 2)),
        **_PATCH_SPACE,
    },
    (9, 0): {
        "context_forward": _context_space(
            (1, 32, 4, 2), (1, 64, 8, 2), (2, 32, 4, 2), (2, 64, 4, 2), (2, 64, 4, 3),
            (2, 64, 8, 2), (4, 32, 8, 2), (4, 64, 8, 2),
        ),
        "context_backward": _context_space(
            (2, 32, 4, 2), (2, 32, 8, 2), (4, 32, 8, 2),
        ),
        "context_kv_grad": _context_space((1, 32, 4, 2), (1, 64, 4, 2), (1, 64, 8, 2)),
        **_PATCH_SPACE,
    },
}  # fmt: skip

SEARCH_SPACE: Mapping[str, tuple[KernelSetting | PatchSetting, ...]] = {
    kernel: tuple(dict.fromkeys(setting for space in SEARCH_SPACES.values() for setting in space[kernel]))
    for kernel in CONTEXT_KERNELS + PATCH_KERNELS
}
"""The settings of all chips together: what must give right results everywhere."""


@overload
def setting_for(
    kernel: ContextKernel,
    *,
    dtype: torch.dtype,
    head_dim: int,
    images: int,
    device_name: str | None,
    capability: tuple[int, int] | None,
) -> KernelSetting: ...
@overload
def setting_for(
    kernel: PatchKernel, *, dtype: torch.dtype, device_name: str | None, capability: tuple[int, int] | None
) -> PatchSetting: ...
@functools.cache
def setting_for(
    kernel: str,
    *,
    dtype: torch.dtype,
    device_name: str | None,
    capability: tuple[int, int] | None,
    head_dim: int | None = None,
    images: int | None = None,
) -> KernelSetting | PatchSetting:
    """The shipped setting of a kernel.

    Args:
        dtype: of the activations. float64 (the interpreter alone runs it) takes the setting of float32.
        head_dim: width of a head; the row with the smallest width that holds it is taken.
        images: largest number of images of a sample in this call.
        device_name, capability: as CUDA reports them (`gpu_of`); None off a GPU: the defaults of the newest chip.

    Raises:
        SettingError: no row fits, or a file is wrong.
    """
    if kernel not in CONTEXT_KERNELS + PATCH_KERNELS:
        raise SettingError(f"kernel {kernel!r} is unknown; choose from {', '.join(CONTEXT_KERNELS + PATCH_KERNELS)}")
    if kernel in CONTEXT_KERNELS and (head_dim is None or images is None):
        raise SettingError(f"{kernel}: a setting is found by head_dim and images too; give both")
    name = "float32" if dtype == torch.float64 else str(dtype).removeprefix("torch.")
    for path in _files(kernel, device_name, capability):
        fitting = [row for row in load(path) if row.kernel == kernel and row.dtype == name and row.fits(images)]
        if kernel in CONTEXT_KERNELS:
            assert head_dim is not None
            widths = sorted({row.head_dim for row in fitting if row.head_dim is not None and row.head_dim >= head_dim})
            fitting = [row for row in fitting if widths and row.head_dim == widths[0]]
        if fitting:
            # A bucket of its own before `any`.
            return min(fitting, key=lambda row: row.images == ANY_IMAGES).setting
    raise SettingError(
        f"{kernel}: no setting for dtype {name}, head width {head_dim}, {images} images on {device_name or 'no GPU'}; "
        f"add a row to {_folder(kernel).name}/configs, or run on the backend reference or materialised"
    )


@functools.cache
def gpu_of(device: torch.device) -> tuple[str | None, tuple[int, int] | None]:
    """(device name, compute capability) of a device; (None, None) off CUDA. Asks the driver once."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)


def settings_files() -> list[Path]:
    """Every settings file of this package."""
    return sorted(
        path for folder in sorted(set(_FOLDERS.values())) for path in (_ROOT / folder / "configs").glob("*.json")
    )


def capability_of(path: Path) -> tuple[int, int]:
    """The compute capability a settings file is for: "sm_90" in its name, or what a tuned file says it measured.

    Raises:
        SettingError: the file says neither.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if found := re.fullmatch(r"sm_(\d+)(\d)", path.stem):
        return int(found[1]), int(found[2])
    try:
        major, minor = content["measured"]["capability"]
    except (KeyError, TypeError, ValueError) as error:
        raise SettingError(f"{path}: measured.capability must be [major, minor]") from error
    return major, minor


def file_name(device_name: str) -> str:
    """The file of a GPU's tuned settings: "NVIDIA H200" -> "nvidia_h200.json"."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") + ".json"


@dataclass(frozen=True)
class SettingRow:
    """One row of a settings file."""

    kernel: str
    dtype: str
    head_dim: int | None
    images: str
    setting: KernelSetting | PatchSetting

    def fits(self, images: int | None) -> bool:
        return images is None or self.images in (ANY_IMAGES, bucket_of(images))


def bucket_of(images: int) -> str:
    """The bucket of a number of images, 1 or more."""
    return next(name for name, largest in IMAGE_BUCKETS.items() if largest is None or images <= largest)


@functools.cache
def load(path: Path) -> tuple[SettingRow, ...]:
    """All rows of a settings file, checked.

    Raises:
        SettingError: naming the file, the row, what is wrong and what would be right.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError(f"{path}: cannot be read as JSON: {error}") from error
    _check_keys(content, {"gpu": str, "tuned": bool, "how": str, "settings": list}, {"measured": dict}, where=str(path))
    if content["tuned"] and "measured" not in content:
        raise SettingError(f"{path}: tuned is true but `measured` (GPU, driver, versions, commit) is missing")
    rows = tuple(_row(row, where=f"{path}: settings[{i}]") for i, row in enumerate(content["settings"]))
    keys = [(row.kernel, row.dtype, row.head_dim, row.images) for row in rows]
    for i, key in enumerate(keys):
        if key in keys[:i]:
            raise SettingError(f"{path}: settings[{i}] repeats settings[{keys.index(key)}]: {key}")
    return rows


def _row(row: Any, *, where: str) -> SettingRow:
    kernel = row.get("kernel") if isinstance(row, dict) else None
    if kernel not in CONTEXT_KERNELS + PATCH_KERNELS:
        known = ", ".join(CONTEXT_KERNELS + PATCH_KERNELS)
        raise SettingError(f"{where}: kernel {kernel!r} is unknown; choose from {known}")
    is_context = kernel in CONTEXT_KERNELS
    cls = KernelSetting if is_context else PatchSetting
    key_types: dict[str, type] = {"kernel": str, "dtype": str}
    if is_context:
        key_types |= {"head_dim": int, "images": str}
    names = [f.name for f in fields(cls)]
    _check_keys(row, key_types | dict.fromkeys(names, int), {}, where=where)
    if row["dtype"] not in DTYPES:
        raise SettingError(f"{where}: dtype {row['dtype']!r} is unknown; choose from {', '.join(DTYPES)}")
    images = row.get("images", ANY_IMAGES)
    if images not in (ANY_IMAGES, *IMAGE_BUCKETS):
        raise SettingError(
            f"{where}: images {images!r} is no bucket; choose from {ANY_IMAGES}, {', '.join(IMAGE_BUCKETS)}"
        )
    for name in names + ["head_dim"] * is_context:
        value = row[name]
        # Triton's tiles are powers of two; stages alone are a plain count.
        if value < 1 or (name != "num_stages" and value & (value - 1)):
            raise SettingError(f"{where}: {name} is {value}; it must be a power of two")
    return SettingRow(kernel, row["dtype"], row.get("head_dim"), images, cls(**{name: row[name] for name in names}))


def _check_keys(content: Any, required: dict[str, type], optional: dict[str, type], *, where: str) -> None:
    """Exactly these keys with values of exactly these types (a bool is no int)."""
    if not isinstance(content, dict):
        raise SettingError(f"{where}: must be an object, is {type(content).__name__}")
    known = required | optional
    if unknown := sorted(set(content) - set(known)):
        raise SettingError(f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(known)}")
    if missing := [name for name in required if name not in content]:
        raise SettingError(f"{where}: {', '.join(missing)} is missing")
    for name, value in content.items():
        if type(value) is not known[name]:
            raise SettingError(f"{where}: {name} must be {known[name].__name__}, is {value!r}")


def _folder(kernel: str) -> Path:
    return _ROOT / _FOLDERS[kernel]


def _files(kernel: str, device_name: str | None, capability: tuple[int, int] | None) -> list[Path]:
    """The files to look into, the most special first."""
    folder = _folder(kernel) / "configs"
    named = [folder / file_name(device_name)] if device_name is not None else []
    at_most = capability or DEFAULT_CAPABILITIES[-1]
    defaults = [c for c in DEFAULT_CAPABILITIES if c <= at_most][-1:]
    return [p for p in named if p.is_file()] + [folder / f"sm_{major}{minor}.json" for major, minor in defaults]
