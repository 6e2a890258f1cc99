from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from samtrain.core.errors import InputError
from samtrain.launch.output_dir import claim, differing_keys, resolve_output_dir, restart_recipe
from samtrain.recipe import Recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def make(tmp_path: Path) -> MakeRecipe:
    def build(*, folder: str = "run", **train: Any) -> Recipe:
        values = {"name": "x", "output_dir": str(tmp_path / folder), "data": {"path": "d"}, "train": train}
        return Recipe.model_validate(values)

    return build


def start(recipe: Recipe) -> Path:
    output = resolve_output_dir(recipe)
    claim(output)
    return output.path


def save(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "COMPLETE").touch()
    return checkpoint


def finish(folder: Path) -> None:
    (folder / "finished.json").write_text("{}")


def test_an_absent_or_empty_folder_takes_a_new_run(make: MakeRecipe, tmp_path: Path) -> None:
    output = resolve_output_dir(make())
    assert (output.action, output.path, output.recipe) == ("new", tmp_path / "run", make())
    (tmp_path / "run").mkdir()
    assert resolve_output_dir(make()).action == "new"


def test_an_unfinished_run_of_the_same_recipe_resumes(make: MakeRecipe) -> None:
    folder = start(make())
    save(folder, 5), save(folder, 40), (folder / "checkpoint-100").mkdir()  # the last is torn
    output = resolve_output_dir(make())
    assert (output.action, output.path) == ("resume", folder)
    assert output.explanation.endswith("checkpoint-40")


def test_a_finished_run_stays_and_the_next_goes_beside_it(make: MakeRecipe, tmp_path: Path) -> None:
    finish(start(make()))
    second = resolve_output_dir(make())
    assert (second.action, second.path) == ("new", tmp_path / "run-2")
    assert str(tmp_path / "run") in second.explanation and "stays" in second.explanation
    finish(start(make()))
    third = start(make())
    assert third == tmp_path / "run-3"
    save(third, 1)  # interrupted: launching again goes on with it
    output = resolve_output_dir(make())
    assert (output.action, output.path) == ("resume", third)


def test_another_run_is_refused_with_the_keys_that_differ(make: MakeRecipe) -> None:
    save(start(make(learning_rate=1e-3)), 1)
    with pytest.raises(InputError, match=r"train\.learning_rate: 0\.001 -> 0\.002") as caught:
        resolve_output_dir(make(learning_rate=2e-3))
    assert "warmup" not in str(caught.value)


def test_another_run_that_is_finished_is_refused_too(make: MakeRecipe) -> None:
    finish(start(make(learning_rate=1e-3)))
    with pytest.raises(InputError, match="holds another run"):
        resolve_output_dir(make(learning_rate=2e-3))


def test_keys_that_do_not_decide_the_numbers_may_change(make: MakeRecipe) -> None:
    save(start(make()), 1)
    changed = make(logging_steps=7, save_steps=3).model_copy(update={"description": "new", "name": "y"})
    changed = changed.model_copy(update={"launch": changed.launch.model_copy(update={"num_workers": 4})})
    assert resolve_output_dir(changed).action == "resume"


def test_no_resume_refuses_an_unfinished_run(make: MakeRecipe) -> None:
    save(start(make(resume_from_checkpoint=None)), 1)
    with pytest.raises(InputError, match="resume_from_checkpoint is null"):
        resolve_output_dir(make(resume_from_checkpoint=None))


def test_a_start_that_failed_before_its_first_checkpoint_blocks_nothing(make: MakeRecipe) -> None:
    start(make(learning_rate=1e-3))
    assert resolve_output_dir(make(learning_rate=2e-3)).action == "new"


def test_a_named_checkpoint_of_this_folder_goes_on_with_another_recipe(make: MakeRecipe) -> None:
    folder = start(make(max_steps=10))
    checkpoint = save(folder, 10)
    output = resolve_output_dir(make(max_steps=20, resume_from_checkpoint=str(checkpoint)))
    assert (output.action, output.path) == ("resume", folder)
    finish(folder)
    output = resolve_output_dir(make(max_steps=20, resume_from_checkpoint=str(checkpoint)))
    assert (output.action, output.path.name) == ("new", "run-2") and str(checkpoint) in output.explanation


def test_a_named_checkpoint_from_elsewhere_does_not_open_another_runs_folder(make: MakeRecipe) -> None:
    elsewhere = save(start(make(folder="elsewhere")), 3)
    save(start(make(learning_rate=1e-3)), 1)
    with pytest.raises(InputError, match="holds another run"):
        resolve_output_dir(make(learning_rate=2e-3, resume_from_checkpoint=str(elsewhere)))


def test_a_named_checkpoint_must_be_complete(make: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(InputError, match="checkpoint-3"):
        resolve_output_dir(make(resume_from_checkpoint=str(tmp_path / "checkpoint-3")))


def test_an_output_dir_that_is_a_file_is_refused(make: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(InputError, match="is a file"):
        resolve_output_dir(make())


def test_the_saved_recipe_differs_from_itself_in_nothing(make: MakeRecipe) -> None:
    import yaml

    recipe = make(learning_rates={"qformer": 1e-5})
    assert differing_keys(yaml.safe_load(recipe.to_yaml()), recipe) == []


def test_a_restart_resumes_once_there_is_something_to_resume(make: MakeRecipe) -> None:
    recipe = make(resume_from_checkpoint=None)
    folder = start(recipe)
    assert restart_recipe(recipe) == recipe
    save(folder, 2)
    assert restart_recipe(recipe).train.resume_from_checkpoint == "auto"
