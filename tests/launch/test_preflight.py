import shutil
from pathlib import Path
from typing import Any

import pytest

from samtrain.core.errors import ConfigError, DataError, InputError
from samtrain.launch.preflight import preflight
from samtrain.recipe import load_recipe


def check(path: Path, *overrides: str) -> dict[str, str]:
    """The plan's rows by name."""
    events: list[dict[str, Any]] = []
    plan = preflight(load_recipe(path, list(overrides)), where="nowhere", emit=events.append)
    assert [event["kind"] for event in events] == ["plan"] and events[0]["rows"] == plan.rows
    return dict(plan.rows)


def test_a_good_recipe_yields_the_plan_and_writes_nothing(tiny_recipe: Path, tmp_path: Path) -> None:
    rows = check(tiny_recipe)
    assert "train 12, validation 4, test 4 samples; 3 steps an epoch" in rows["data"]
    # 2 images x 2 queries, bos-less: 9 words, answer "a red cat" and eos
    assert "17 tokens, 2 images" in rows["largest sample"]
    assert rows["steps"].startswith("2 of 4 samples")
    assert "frozen" in rows["vision"] and "train" in rows["qformer"]
    assert "of host memory a worker" in rows["checkpoint copy"]
    assert not (tmp_path / "run").exists()


def test_parameters_are_counted_from_shapes_exactly(tiny_recipe: Path) -> None:
    from samtrain.launch.preflight import _parameters
    from samtrain.model.build import build_model
    from samtrain.model.freezing import trainable_counts

    for overrides in ([], ["model.train.language_model=lora"], ["model.train.language_model=full"]):
        recipe = load_recipe(tiny_recipe, overrides)
        import torch

        model = build_model(recipe.model, dtype=torch.float32, seed=0).model
        assert _parameters(recipe) == trainable_counts(model)


def test_steps_follow_from_epochs_where_max_steps_is_not_set(tiny_recipe: Path) -> None:
    rows = check(tiny_recipe, "train.max_steps=null", "train.num_train_epochs=2.5")
    assert rows["steps"].startswith("8 of 4 samples")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.guidance.contextual_layer=5", r"contextual_layer.*\(k = 5\) <= 4, the layers of the Q-Former"),
        ("data.max_tokens=16", r"train-\d+.*17"),
        ("data.max_images=1", r"train-\d+.*2 images"),
        ("data.train_split=trian", "has no split 'trian' .*it holds test, train, validation"),
        ("evaluation.splits=[absent]", "has no split 'absent'"),
        ("data.path=/nonexistent/data", "/nonexistent/data.*does not exist"),
        ("data.path=pipe:cat", r"'pipe:cat': a set is a local folder .* https://"),
        ("data.path=s3://me:secret@bucket/x", r"s3://\.\.\.@bucket: no credentials in a URL"),
        ("data.image_size=24", "data.image_size is 24"),
        ("model.tokenizer_name_or_path=null", "tokenizer_name_or_path is not set"),
        ("model.liger=true", "model.liger is true, but its kernels need a GPU"),
        ("model.attn_implementation=flex_attention", "flex_attention, but it needs a GPU and this runs on cpu"),
        ("model.vision.config.hidden_sice=4", "hidden_sice"),
        ("train.resume_from_checkpoint=/nonexistent/checkpoint-3", "checkpoint-3"),
        ("model.train={guidance: false}", "nothing trains"),
        ("model.kernels=fast", r"model.kernels` = 'fast': .*'auto', 'triton', 'reference' or 'materialised'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(tiny_recipe: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(tiny_recipe, override)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["launch.device=cpu"], "materialised on cpu (model.kernels: auto)"),
        (["launch.device=cpu", "model.kernels=reference"], "materialised on cpu (model.kernels: reference)"),
        (
            ["launch.device=cpu", "model.kernels=reference", "model.train.qformer=false"],
            "reference on cpu (model.kernels: reference)",
        ),
        (["launch.device=cuda", "launch.num_workers=4"], "auto; decided where the workers run"),
    ],
)
def test_the_plan_says_which_kernels_run(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], expected: str
) -> None:
    """The tiny Q-Former has attention dropout, which the materialised path alone has: where it trains, nothing else."""
    monkeypatch.setattr("samtrain.launch.devices.local_gpus", lambda: 0)
    rows = check(tiny_recipe, *overrides)
    assert rows["kernels"] == expected
    on_cpu, elsewhere = "off: its kernels need a GPU and this runs on cpu", "auto; decided where the workers run"
    attention = "sdpa on cpu (model.attn_implementation: auto)"
    assert rows["attention"] == (attention if "launch.device=cpu" in overrides else elsewhere)
    compiled = "off: auto compiles on a GPU and this runs on cpu"
    assert rows["compiled vision"] == (compiled if "launch.device=cpu" in overrides else elsewhere)
    assert rows["liger"] == (on_cpu if "launch.device=cpu" in overrides else elsewhere)


def test_elsewhere_the_workers_decide_on_kernels(tiny_recipe: Path) -> None:
    recipe = load_recipe(tiny_recipe, ["launch.device=auto", "model.kernels=triton"])
    rows = dict(preflight(recipe, where="the cluster", emit=lambda event: None, is_here=False).rows)
    assert rows["kernels"] == "triton; decided where the workers run"


def test_a_missing_shard_or_index_is_named(tiny_recipe: Path, shared_files: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shared_files / "data", copy)
    (copy / "train" / "shard-000000.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000000\.tar"):
        check(tiny_recipe, f"data.path={copy}")
    (copy / "train" / "index.json").unlink()
    with pytest.raises(DataError, match=r"index\.json.*samtrain data index"):
        check(tiny_recipe, f"data.path={copy}")


def test_too_little_disk_is_an_error_with_both_numbers(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"needs about .* GiB .* 0\.00 GiB free"):
        check(tiny_recipe)


def test_a_set_that_is_no_mini_set_is_not_overwritten_by_build(tiny_recipe: Path) -> None:
    with pytest.raises((DataError, ConfigError), match="mmlink-mini"):
        check(tiny_recipe, "data.build=mmlink-mini")


def test_the_plan_of_a_mixture_says_what_the_weights_come_to(tiny_recipe: Path, shared_files: Path) -> None:
    path = shared_files / "data"
    mixture = f"[{{name: b, path: {path}, weight: 1}}, {{name: a, path: {path}, weight: 3, split: validation}}]"
    rows = check(tiny_recipe, f"data.mixture={mixture}", "train.max_steps=null", "train.num_train_epochs=3")
    assert rows["mixture"] == "16 samples in all, 4 steps an epoch"
    assert rows["steps"].startswith("12 of 4 samples")
    assert rows["  a"] == f"{path}/validation: 4 samples, 75.0 % of those met, each 9.0 times in this run"
    assert rows["  b"] == f"{path}/train: 12 samples, 25.0 % of those met, each 1.0 times in this run"
    assert rows["held out"] == f"{path}: validation 4, test 4 samples"
    assert "b/train-" in rows["largest sample"]


def test_a_source_that_is_not_there_is_named(tiny_recipe: Path, shared_files: Path) -> None:
    mixture = f"[{{name: a, path: {shared_files / 'data'}, weight: 1, split: trian}}]"
    with pytest.raises(
        DataError, match=r"data\.mixture: a: .* has no split 'trian' .*it holds test, train, validation"
    ):
        check(tiny_recipe, f"data.mixture={mixture}")
