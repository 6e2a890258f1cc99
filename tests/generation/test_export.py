import json
import multiprocessing
import shutil
import weakref

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from samtrain.core.errors import CheckpointError
from samtrain.generation.export import export_folder, load_exported


def tensors(model):
    return iter(list(model.state_dict().items()))


def assert_equal(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [20_000, 10**9])
def test_a_folder_loads_back_equal(build_model, processor, tmp_path, tie, max_shard_bytes):
    model = build_model(tie=tie)
    folder = tmp_path / "export"
    export_folder(model.config, processor, tensors(model), folder, dtype=torch.float32, max_shard_bytes=max_shard_bytes)
    back, processor_back = load_exported(folder)
    assert_equal(model, back)
    assert not back.training and type(back).__name__ in back.config.architectures
    assert processor_back.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    text = dict(key="k", instruction="What is it?", output="a cat", num_images=2)
    assert processor_back.encode(**text) == processor.encode(**text)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    stored = [name for file in names for name in safe_open(folder / file, "pt").keys()]  # noqa: SIM118
    assert len(stored) == len(set(stored)) == len(model.state_dict()) - tie
    if max_shard_bytes == 20_000:
        largest = max(t.nbytes for t in model.state_dict().values())
        assert len(names) > 2 and names[-1].endswith(f"-of-{len(names):05d}.safetensors")
        assert all((folder / name).stat().st_size < max(20_000, largest) + 20_000 for name in names)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert sorted(index["weight_map"]) == sorted(stored)
    else:
        assert names == ["model.safetensors"]
    assert list(tmp_path.iterdir()) == [folder]


def test_the_folder_is_an_ordinary_hugging_face_folder(model, processor, tmp_path):
    export_folder(model.config, processor, tensors(model), tmp_path / "e", dtype=torch.bfloat16)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "processor_config.json"):
        assert (tmp_path / "e" / name).is_file()
    back = AutoModelForImageTextToText.from_pretrained(tmp_path / "e")
    assert back.dtype == torch.bfloat16 == back.language_model.dtype
    assert AutoProcessor.from_pretrained(tmp_path / "e").num_query_tokens == 3
    generation = GenerationConfig.from_pretrained(tmp_path / "e")
    assert (generation.num_beams, generation.max_new_tokens, generation.eos_token_id) == (
        5,
        255,
        processor.eos_token_id,
    )
    assert load_exported(tmp_path / "e")[0].dtype == torch.float32  # on a CPU
    assert load_exported(tmp_path / "e", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_at_most_one_shard_is_in_memory(model, processor, tmp_path):
    sizes = [tensor.nbytes for tensor in model.state_dict().values()]
    allowed = 20_000 + max(sizes)
    assert sum(sizes) > 2 * allowed
    arrays = []  # a tensor made from an array keeps it alive, whatever views are taken of the tensor

    def stream():
        for name, tensor in model.state_dict().items():
            array = tensor.numpy().copy()
            arrays.append(weakref.ref(array))
            yield name, torch.from_numpy(array)
            del array
            assert sum(array.nbytes for ref in arrays if (array := ref()) is not None) <= allowed
            array = None

    export_folder(model.config, processor, stream(), tmp_path / "e", dtype=torch.float32, max_shard_bytes=20_000)
    assert_equal(model, load_exported(tmp_path / "e")[0])


def test_gaps_and_strangers_are_errors_and_leave_the_earlier_export(model, processor, tmp_path):
    folder, state = tmp_path / "e", model.state_dict()
    export_folder(model.config, processor, tensors(model), folder, dtype=torch.float32)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    without = {
        name: tensor for name, tensor in state.items() if name != "guidance.a.weight" and "query_tokens" not in name
    }
    cases = [
        (without, "1 tensors are missing: query_tokens"),
        (state | {"language_model.base_model.lora_A": torch.zeros(1)}, "lora_A has no place"),
        (state | {"query_tokens": torch.zeros(1, 2, 16)}, r"query_tokens has shape \(1, 2, 16\).*\(1, 3, 16\)"),
        (state | {"query_tokens": None}, "query_tokens has shape None"),
    ]
    for values, message in cases:
        seen = []
        with pytest.raises(CheckpointError, match=message):
            items = ((name, seen.append(name) or tensor) for name, tensor in values.items())
            export_folder(model.config, processor, items, folder, dtype=torch.float32)
        assert seen == list(values)  # the iterator runs to its end: other ranks take part in it
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_full_disk_is_said_before_anything_is_written(model, processor, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="GB are free there"):
        export_folder(model.config, processor, tensors(model), tmp_path / "e", dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "model_type is 'llama'"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "cannot be loaded"),
        (lambda f: (f / "tokenizer.json").unlink(), "cannot be loaded"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_a_checkpoint_error(model, processor, tmp_path, damage, message):
    folder = tmp_path / "e"
    export_folder(model.config, processor, tensors(model), folder, dtype=torch.float32)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        load_exported(folder)
    assert str(folder) in str(error.value)


def test_weights_that_do_not_belong_to_the_config_are_refused(model, processor, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "e"
    export_folder(model.config, processor, tensors(model), folder, dtype=torch.float32)
    weights = load_file(folder / "model.safetensors")
    del weights["query_tokens"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing tensors, e\.g\. query_tokens"):
        load_exported(folder)


def _rank(rank, port, folder, queue):
    import os
    from importlib.util import module_from_spec, spec_from_file_location

    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    spec = spec_from_file_location("fixtures", os.path.join(os.path.dirname(__file__), "conftest.py"))
    fixtures = module_from_spec(spec)
    spec.loader.exec_module(fixtures)
    processor = fixtures.make_processor()
    model = fixtures.make_model(processor)

    def gathered(suffix):
        for name, tensor in model.state_dict().items():
            dist.barrier()  # as a gather is: both ranks must come here
            yield name + suffix, tensor if rank == 0 else None

    try:
        export_folder(model.config, processor, gathered("x"), folder, dtype=torch.float32)
    except CheckpointError as error:
        queue.put((rank, str(error)))
    export_folder(model.config, processor, gathered(""), folder, dtype=torch.float32)
    dist.destroy_process_group()


def test_two_ranks_fail_together_and_export_together(tmp_path, free_port):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_rank, args=(r, free_port, tmp_path / "e", queue)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
        assert process.exitcode == 0
    said = dict(queue.get(timeout=10) for _ in processes)
    assert "no place in the model" in said[0] and "rank 0 could not export" in said[1]
    load_exported(tmp_path / "e")
