"""Settings files: what is found, and what is refused."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from samtrain_kernels import settings
from samtrain_kernels.settings import (
    DTYPES,
    SEARCH_SPACE,
    SEARCH_SPACES,
    ContextKernel,
    KernelSetting,
    PatchKernel,
    PatchSetting,
    SettingError,
    bucket_of,
    capability_of,
    file_name,
    load,
    setting_for,
    settings_files,
)

ROW = {
    "kernel": "context_forward", "head_dim": 64, "dtype": "bfloat16", "images": "any",
    "images_per_block": 2, "block_patches": 64, "num_warps": 4, "num_stages": 2,
}  # fmt: skip


def content(*rows: Any, **changes: Any) -> dict[str, Any]:
    return {"gpu": "sm_90", "tuned": False, "how": "by hand", "settings": list(rows)} | changes


def written(folder: Path, what: Any, name: str = "sm_90.json") -> Path:
    path = folder / name
    path.write_text(what if isinstance(what, str) else json.dumps(what))
    return path


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), None])
@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64])
def test_every_kernel_has_a_setting_on_every_supported_chip(
    capability: tuple[int, int] | None, dtype: torch.dtype
) -> None:
    for kernel in get_args(ContextKernel):
        for head_dim in (8, 16, 32, 64):
            for images in (1, 2, 5, 12):
                found = setting_for(
                    kernel, dtype=dtype, head_dim=head_dim, images=images, device_name="a GPU", capability=capability
                )
                assert isinstance(found, KernelSetting)
    for kernel in get_args(PatchKernel):
        assert isinstance(setting_for(kernel, dtype=dtype, device_name=None, capability=capability), PatchSetting)


def test_the_search_space_holds_the_default_of_every_kernel() -> None:
    """The tuner compares with what ships."""
    for kernel in get_args(ContextKernel) + get_args(PatchKernel):
        for capability in settings.DEFAULT_CAPABILITIES:
            key: dict[str, Any] = {"dtype": torch.bfloat16, "device_name": None, "capability": capability}
            key |= {"head_dim": 64, "images": 5} if kernel in get_args(ContextKernel) else {}
            assert setting_for(kernel, **key) in SEARCH_SPACES[capability][kernel], (kernel, capability)
        assert len(set(SEARCH_SPACE[kernel])) == len(SEARCH_SPACE[kernel])


def test_shipped_files_are_sound() -> None:
    files = settings_files()
    assert {path.name for path in files} >= {"sm_80.json", "sm_90.json"}
    for path in files:
        assert load(path)
        assert capability_of(path) >= (8, 0)
        assert path.stem.startswith("sm_") != json.loads(path.read_text())["tuned"]


@pytest.mark.parametrize("images,bucket", [(1, "1-2"), (2, "1-2"), (3, "3-4"), (5, "5-6"), (7, "7+"), (100, "7+")])
def test_numbers_of_images_fall_into_buckets(images: int, bucket: str) -> None:
    assert bucket_of(images) == bucket


def test_a_tuned_file_wins_row_by_row_and_a_bucket_wins_over_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "context_attention" / "configs"
    folder.mkdir(parents=True)
    wide = ROW | {"head_dim": 128, "block_patches": 32}
    written(folder, content(ROW, wide))
    measured = {"capability": [9, 0]}
    tuned = [ROW | {"images_per_block": 1}, ROW | {"images": "3-4", "images_per_block": 4}]
    written(folder, content(*tuned, gpu="NVIDIA H200", tuned=True, measured=measured), "nvidia_h200.json")
    monkeypatch.setattr(settings, "_ROOT", tmp_path)
    setting_for.cache_clear()  # type: ignore[attr-defined]

    def images_per_block(device_name: str | None, head_dim: int, images: int) -> tuple[int, int]:
        key: dict[str, Any] = {"dtype": torch.bfloat16, "capability": (9, 0)}
        found = setting_for("context_forward", head_dim=head_dim, images=images, device_name=device_name, **key)
        return found.images_per_block, found.block_patches

    try:
        assert images_per_block("NVIDIA H200", 64, 2) == (1, 64)
        assert images_per_block("NVIDIA H200", 64, 4) == (4, 64)
        assert images_per_block("NVIDIA H200", 128, 4) == (2, 32)  # the tuned file has no such row
        assert images_per_block("NVIDIA H100", 64, 4) == (2, 64)
        assert images_per_block("NVIDIA H100", 16, 4) == (2, 64)  # the narrowest row that holds it
        with pytest.raises(SettingError, match="no setting for dtype bfloat16, head width 256, 4 images on NVIDIA"):
            images_per_block("NVIDIA H100", 256, 4)
    finally:
        setting_for.cache_clear()  # type: ignore[attr-defined]


def test_file_names_come_from_the_device_name() -> None:
    assert file_name("NVIDIA H200") == "nvidia_h200.json"
    assert file_name("NVIDIA A100-SXM4-80GB") == "nvidia_a100_sxm4_80gb.json"


def test_a_question_that_lacks_its_key_is_refused() -> None:
    with pytest.raises(SettingError, match="kernel 'flash' is unknown; choose from context_forward"):
        setting_for("flash", dtype=torch.float32, device_name=None, capability=None)  # type: ignore[call-overload]
    with pytest.raises(SettingError, match="found by head_dim and images too"):
        setting_for("context_forward", dtype=torch.float32, device_name=None, capability=None)  # type: ignore[call-overload]
    with pytest.raises(SettingError, match="no setting"):  # older than Ampere
        setting_for("patch_logits", dtype=torch.float16, device_name="Tesla T4", capability=(7, 5))


@pytest.mark.parametrize(
    "what,message",
    [
        ("{", "cannot be read as JSON"),
        ([], "must be an object, is list"),
        (content(ROW, extra=1), "unknown key extra"),
        ({"gpu": "sm_90"}, "tuned, how, settings is missing"),
        (content(ROW, tuned=1), "tuned must be bool, is 1"),
        (content(ROW, tuned=True), "`measured` .* is missing"),
        (content(ROW | {"kernel": "mystery"}), r"settings\[0\]: kernel 'mystery' is unknown"),
        (content("row"), r"settings\[0\]: kernel None is unknown"),
        (content(ROW, ROW | {"dtype": "float64"}), r"settings\[1\]: dtype 'float64' is unknown"),
        (content(ROW | {"images": "5"}), "images '5' is no bucket; choose from any, 1-2"),
        (content({k: v for k, v in ROW.items() if k != "num_warps"}), "num_warps is missing"),
        (content(ROW | {"block_rows": 8}), "unknown key block_rows"),
        (content(ROW | {"block_patches": 48}), "block_patches is 48; it must be a power of two"),
        (content(ROW | {"num_warps": 0}), "num_warps is 0"),
        (content(ROW | {"num_stages": True}), "num_stages must be int, is True"),
        (content(ROW | {"head_dim": "64"}), "head_dim must be int, is '64'"),
        (content(ROW, ROW | {"num_warps": 8}), r"settings\[1\] repeats settings\[0\]"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_and_the_place_named(tmp_path: Path, what: Any, message: str) -> None:
    with pytest.raises(SettingError, match=f"sm_90.json.*{message}"):
        load(written(tmp_path, what))


def test_a_correct_file_is_read(tmp_path: Path) -> None:
    (row,) = load(written(tmp_path, content(ROW)))
    assert row.setting == KernelSetting(2, 64, 4, 2)
    assert row.setting.options == {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
