"""Imports go one way:
launch, cli -> train, recipe -> engine | evaluation | generation -> model | data | tracking -> core.

Read from the syntax trees, so that imports inside functions count too. `samtrain/<part>/options.py` modules are the
vocabulary of recipes: the recipe may read them all, and each stands on core alone.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAMTRAIN = ROOT / "samtrain"
KERNELS = ROOT / "kernels"

# part -> parts it may import, besides itself
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "tracking": {"core"},
    "data": {"core"},
    "model": {"core", "samtrain_kernels"},
    "engine": {"core"},
    "generation": {"core", "model", "data", "tracking"},
    "evaluation": {"core", "model", "data", "tracking", "generation"},
    "recipe": {"core"},
    "train": {"core", "tracking", "data", "model", "engine", "generation", "evaluation", "recipe"},
    "launch": {"core", "tracking", "data", "model", "engine", "generation", "evaluation", "recipe", "train"},
    "cli": {"core", "tracking", "data", "model", "engine", "generation", "evaluation", "recipe", "train", "launch"},
}

# library -> the only files that may import it
ONLY_IN: dict[str, set[str]] = {
    "deepspeed": {"samtrain/engine/zero.py"},
    "fsspec": {"samtrain/data/storage.py"},
    "aiohttp": {"samtrain/data/storage.py"},
    "liger_kernel": {"samtrain/model/liger.py"},
    "ray": {"samtrain/launch/ray_backend.py", "samtrain/data/mmlink/ray_data.py"},
    "mlflow": {"samtrain/tracking/mlflow_tracker.py"},
}

# What the engine may stand on: it sees modules and iterables, so no library of models, data or pictures.
ENGINE_LIBRARIES = {"torch", "deepspeed", "numpy", "safetensors", "pydantic"}

KERNEL_LIBRARIES = {"torch", "triton", "samtrain_kernels"}


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, dotted module) of every import; what only runs as a script (`__name__ == "__main__"`) is an entry
    point of its own and not counted, nor is what only type checkers read."""
    tree = ast.parse(path.read_text(), filename=str(path))
    found: list[tuple[int, str]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING"):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.extend((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole name"
            module = node.module or ""
            found.append((node.lineno, module))
            found.extend((node.lineno, f"{module}.{alias.name}") for alias in node.names if module == "samtrain")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def part_of_module(module: str) -> str:
    names = module.split(".")
    return names[0] if names[0] == "samtrain_kernels" else names[1] if len(names) > 1 else ""


def python_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.py") if "__pycache__" not in path.parts)


def wrong_directions(path: Path, *, package: Path = SAMTRAIN) -> list[str]:
    relative = path.relative_to(package)
    part, wrong = relative.parts[0] if len(relative.parts) > 1 else relative.stem, []
    if part == "__init__":
        return []
    assert part in ALLOWED, f"{path}: a new part; say in ALLOWED what it may import"
    for line, module in imports_of(path):
        if module.split(".")[0] not in ("samtrain", "samtrain_kernels"):
            continue
        target = part_of_module(module)
        is_options = module.endswith(".options") and part == "recipe"
        if target not in {"", part, "__version__"} | ALLOWED[part] and not is_options:
            wrong.append(f"samtrain/{relative}:{line}: {part} must not import {module}")
    return wrong


def test_imports_go_down_only() -> None:
    wrong = [line for path in python_files(SAMTRAIN) for line in wrong_directions(path)]
    assert wrong == [], "\n".join(wrong)


def test_options_stand_on_core_alone() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in SAMTRAIN.glob("*/options.py")
        for line, module in imports_of(path)
        if module.startswith("samtrain") and not module.startswith("samtrain.core")
    ]
    assert wrong == [], "\n".join(wrong)


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_a_heavy_library_has_one_importer(library: str) -> None:
    importers = {
        str(path.relative_to(ROOT))
        for path in python_files(SAMTRAIN) + python_files(KERNELS)
        for _, module in imports_of(path)
        if module.split(".")[0] == library
    }
    assert importers <= ONLY_IN[library]


def outside_libraries(path: Path) -> set[str]:
    tops = {module.split(".")[0] for _, module in imports_of(path)}
    return {top for top in tops if top not in sys.stdlib_module_names and top != "samtrain"}


def test_the_engine_knows_no_library_of_models_or_data() -> None:
    wrong = {
        str(path.relative_to(ROOT)): extra
        for path in python_files(SAMTRAIN / "engine")
        if (extra := outside_libraries(path) - ENGINE_LIBRARIES)
    }
    assert wrong == {}


def test_kernels_import_torch_and_triton_alone() -> None:
    wrong = {
        str(path.relative_to(ROOT)): extra
        for path in python_files(KERNELS)
        if (extra := outside_libraries(path) - KERNEL_LIBRARIES)
    }
    assert wrong == {}
    assert not [m for path in python_files(KERNELS) for _, m in imports_of(path) if m.split(".")[0] == "samtrain"]


def test_the_kernels_folder_is_not_a_package() -> None:
    """With `kernels/__init__.py`, a checkout on the path would hide Hugging Face's `kernels` from transformers."""
    assert not (KERNELS / "__init__.py").exists()


def test_an_import_that_goes_up_is_found_inside_functions_too(tmp_path: Path) -> None:
    bad = tmp_path / "model" / "bad.py"
    bad.parent.mkdir()
    bad.write_text("def f():\n    from samtrain.data.index import ShardIndex\n    return ShardIndex\n")
    expected = ["samtrain/model/bad.py:2: model must not import samtrain.data.index"]
    assert wrong_directions(bad, package=tmp_path) == expected
