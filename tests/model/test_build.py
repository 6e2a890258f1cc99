"""Building a model from its parts: what is loaded by name, what is new, what is dropped, what is refused."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from samtrain_kernels import resolve_backend
from transformers import AutoModelForCausalLM, InstructBlipConfig, InstructBlipForConditionalGeneration, LlamaConfig

from samtrain.core.errors import CheckpointError, ConfigError
from samtrain.model import SamMllmForConditionalGeneration, SamMllmProcessor, build_model, build_processor
from samtrain.model.freezing import part_of
from samtrain.model.options import ModelOptions
from samtrain.model.packaged import packaged_folder

GUIDANCE = {"initial_layer": 3, "contextual_layer": 3, "max_images": 5}
PARTS = {
    "vision": {
        "config": {"model_type": "instructblip_vision_model", "hidden_size": 12, "intermediate_size": 16,
                   "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
                   "initializer_range": 0.2},
    },
    "qformer": {
        "config": {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
                   "intermediate_size": 24, "max_position_embeddings": 32},
        "num_query_tokens": 3, "max_text_tokens": 16,
    },
    "language_model": {
        "config": {"model_type": "llama", "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24,
                   "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256,
                   "tie_word_embeddings": True},
    },
}  # fmt: skip


def options(tokenizers: dict[str, str], **changes: Any) -> ModelOptions:
    return ModelOptions.model_validate({**tokenizers, **PARTS, "guidance": GUIDANCE, **changes})


def whole(folder: Path, tokenizers: dict[str, str]) -> ModelOptions:
    values = {"model_name_or_path": str(folder), "guidance": GUIDANCE, "qformer": {"max_text_tokens": 16}}
    return ModelOptions.model_validate({**values, **tokenizers})


def build(opts: ModelOptions, *, seed: int = 7, **kwargs: Any) -> Any:
    built = build_model(opts, dtype=torch.float32, seed=seed, **kwargs)
    return built.model, built.report


@pytest.fixture
def instructblip(tmp_path: Path, tiny_config: Any) -> Path:
    """A sharded local InstructBLIP checkpoint, as transformers saves it, with processor folders."""
    c = tiny_config()
    config = InstructBlipConfig(
        vision_config=c.vision_config, qformer_config=c.qformer_config, text_config=c.text_config, num_query_tokens=3,
        image_token_index=59,
    )  # fmt: skip
    torch.manual_seed(3)
    model = InstructBlipForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    folder = tmp_path / "instructblip"
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_a_sharded_instructblip_checkpoint_loads_whole_by_name(instructblip: Path, tokenizer_folders: Any) -> None:
    opts = whole(instructblip, tokenizer_folders)
    model, report = build(opts)
    theirs = InstructBlipForConditionalGeneration.from_pretrained(instructblip).state_dict()
    ours = model.state_dict()
    assert {n for n in ours if not n.startswith("guidance.")} == set(theirs)
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    for part, entry in report.parts.items():
        assert not entry.missing and not entry.unexpected
        assert bool(entry.new) is (part == "guidance") and bool(entry.loaded) is (part != "guidance")
    assert float(model.guidance.context_projection.weight.abs().max()) == 0.0
    assert dict(report.summary())["vision"].endswith(f"{len(report.parts['vision'].loaded)} loaded")


def test_keys_with_the_newer_model_prefix_load_too(instructblip: Path, tokenizer_folders: Any) -> None:
    index = instructblip / "model.safetensors.index.json"
    from safetensors.torch import load_file, save_file

    state = {f"model.{n}": t for shard in instructblip.glob("*.safetensors") for n, t in load_file(shard).items()}
    for shard in instructblip.glob("*.safetensors"):
        shard.unlink()
    index.unlink()
    save_file(state, instructblip / "model.safetensors")
    opts = whole(instructblip, tokenizer_folders)
    model, report = build(opts)
    assert not any(entry.unexpected for entry in report.parts.values())
    assert torch.equal(model.query_tokens, state["model.query_tokens"])


def test_single_parts_come_from_their_own_sources_and_layers_can_be_dropped(
    instructblip: Path, tokenizer_folders: Any, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    llm = AutoModelForCausalLM.from_config(LlamaConfig(**{**PARTS["language_model"]["config"], "num_hidden_layers": 3}))
    llm.save_pretrained(tmp_path / "llm")
    part = {"model_name_or_path": str(tmp_path / "llm"), "config": {"num_hidden_layers": 2}}
    qformer = {"model_name_or_path": str(instructblip), "num_query_tokens": 3, "max_text_tokens": 16}
    vision = {"model_name_or_path": str(instructblip)}
    model, report = build(options(tokenizer_folders, language_model=part, qformer=qformer, vision=vision))
    ours, theirs = model.language_model.state_dict(), llm.state_dict()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    dropped = report.parts["language_model"].unexpected
    assert dropped and all(".layers.2." in name for name in dropped)
    assert len(report.parts["projection"].new) == 2 and report.parts["projection"].source == "random"
    assert "query_tokens" in report.parts["qformer"].loaded


def test_an_exported_folder_loads_again_with_its_guidance_and_processor(tokenizer_folders: Any, tmp_path: Path) -> None:
    opts = options(tokenizer_folders)
    model, _ = build(opts)
    torch.nn.init.normal_(model.guidance.context_projection.weight)
    folder = tmp_path / "export"
    model.save_pretrained(folder)
    processor = build_processor(opts, image_size=8)
    processor.save_pretrained(folder)
    again = whole(folder, {})
    loaded, report = build(again, seed=8)
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert not any(entry.new or entry.missing or entry.unexpected for entry in report.parts.values())
    reloaded = build_processor(again, image_size=8)
    sample = {"key": "k", "instruction": "what is the cat ?", "output": "yes", "num_images": 2}
    assert reloaded.encode(**sample) == processor.encode(**sample)
    assert loaded.config.image_token_id == processor.image_token_id


def test_the_authors_names_load_into_guidance(tokenizer_folders: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {
        "one_2_muliple.weight": torch.randn(16, 16), "one_2_muliple.bias": torch.randn(16),
        "multiple_2_one.weight": torch.randn(16, 16), "multiple_2_one.bias": torch.randn(16),
        "attn.weight": torch.randn(1, 12), "attn.bias": torch.randn(1),
        "visual_encoder.blocks.0.attn.qkv.weight": torch.randn(2, 2),
    }  # fmt: skip
    path = tmp_path / "sam.pth"
    torch.save({"model": {f"Qformer.{n}" if i % 2 else n: t for i, (n, t) in enumerate(state.items())}}, path)
    model, report = build(options(tokenizer_folders, guidance={**GUIDANCE, "model_name_or_path": str(path)}))
    for theirs, ours in (
        ("one_2_muliple", model.guidance.initial_projection),
        ("multiple_2_one", model.guidance.context_projection),
        ("attn", model.guidance.patch_score),
    ):
        assert torch.equal(ours.weight, state[f"{theirs}.weight"]) and torch.equal(ours.bias, state[f"{theirs}.bias"])
    assert len(report.parts["guidance"].loaded) == 6


def test_a_file_with_code_inside_is_refused(tokenizer_folders: Any, tmp_path: Path) -> None:
    path = tmp_path / "sam.pth"
    torch.save({"attn.weight": torch.zeros(1), "surprise": Path("/")}, path)
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        build(options(tokenizer_folders, guidance={**GUIDANCE, "model_name_or_path": str(path)}))


def test_a_checkpoint_that_lacks_parameters_is_refused(instructblip: Path, tokenizer_folders: Any) -> None:
    file = instructblip / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    lost = index["weight_map"]["language_projection.weight"]
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != lost}
    file.write_text(json.dumps(index))
    opts = whole(instructblip, tokenizer_folders)
    with pytest.raises(CheckpointError, match=r"instructblip: lacks \d+ parameters of"):
        build(opts)


def test_other_shapes_are_refused_with_both(instructblip: Path, tokenizer_folders: Any) -> None:
    part = {"model_name_or_path": str(instructblip), "config": {"intermediate_size": 32}}
    with pytest.raises(CheckpointError, match=r"mlp\.fc1\.\w+ has shape \(16.*the model wants \(32"):
        build(options(tokenizer_folders, vision=part))


def test_random_weights_depend_on_seed_and_name_alone(tokenizer_folders: Any) -> None:
    first, _ = build(options(tokenizer_folders), seed=1)
    torch.manual_seed(99)
    torch.randn(5)
    again, _ = build(options(tokenizer_folders), seed=1)
    other, _ = build(options(tokenizer_folders), seed=2)
    more = {**PARTS["vision"]["config"], "num_hidden_layers": 2}
    deeper, _ = build(options(tokenizer_folders, vision={"config": more}), seed=1)
    a, b, c, d = (m.state_dict() for m in (first, again, other, deeper))
    assert all(torch.equal(a[n], b[n]) for n in a) and all(torch.equal(a[n], d[n]) for n in a)
    assert not torch.equal(a["query_tokens"], c["query_tokens"])
    assert all(torch.isfinite(t).all() for t in a.values())
    assert float(a["language_model.model.norm.weight"].mean()) == 1.0


def test_building_leaves_the_random_state_of_the_process_alone(tokenizer_folders: Any) -> None:
    torch.manual_seed(4)
    expected = torch.randn(3)
    torch.manual_seed(4)
    build(options(tokenizer_folders))
    assert torch.equal(torch.randn(3), expected) and torch.get_default_dtype() == torch.float32


def test_everything_is_written_through_gather(instructblip: Path, tokenizer_folders: Any) -> None:
    """Stand-in for ZeRO-3: parameters may only be written while gathered; the real thing is the engine's test."""
    gathered: set[int] = set()

    @contextmanager
    def gather(params: list[torch.nn.Parameter], *, modifier_rank: int | None = None) -> Iterator[None]:
        assert modifier_rank == 0
        gathered.update(id(p) for p in params)
        yield

    opts = options(tokenizer_folders, vision={"model_name_or_path": str(instructblip)})
    model, _ = build(opts, gather=gather)
    assert gathered == {id(p) for p in model.parameters()}


def test_lora_and_dtype_and_attention_follow_the_options(tokenizer_folders: Any) -> None:
    opts = options(tokenizer_folders, train={"language_model": "lora"}, attn_implementation="eager")
    model = build_model(opts, dtype=torch.bfloat16, seed=1).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {part_of(n) for n in trained} == {"guidance", "language_model"}
    assert all(".lora_" in n for n in trained if part_of(n) == "language_model")
    assert model.language_model.config._attn_implementation == "eager" and not model.training


def test_kernels_are_decided_once_and_never_saved(tokenizer_folders: Any, tmp_path: Path) -> None:
    model = build_model(options(tokenizer_folders, kernels="reference"), dtype=torch.float32, seed=1).model
    assert model.kernels == "reference"
    model.save_pretrained(tmp_path)
    assert "kernels" not in (tmp_path / "config.json").read_text()
    assert SamMllmForConditionalGeneration.from_pretrained(tmp_path).kernels == "auto"
    assert build(options(tokenizer_folders))[0].kernels == resolve_backend("auto", device_type="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"language_model": {}}, "model.language_model: no source"),
        ({"language_model": {"model_name_or_path": "./nowhere"}}, "./nowhere: no such folder"),
        ({"tokenizer_name_or_path": None}, "model.tokenizer_name_or_path is not set"),
        ({"qformer": {**PARTS["qformer"], "max_text_tokens": 33}}, "33: the Q-Former has 32 positions"),
        ({"guidance": {"initial_layer": 2, "contextual_layer": 5}}, "k = 5.*<= 4, the layers of the Q-Former"),
        ({"vision": {"model_name_or_path": "packaged:nothing"}}, "packaged:nothing: unknown; there are"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_with_the_way_out(tokenizer_folders: Any, changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(options(tokenizer_folders, **changes))


def test_a_misspelt_config_key_is_refused_with_the_nearest(instructblip: Path, tokenizer_folders: Any) -> None:
    part = {"model_name_or_path": str(instructblip), "config": {"num_hiden_layers": 1}}
    with pytest.raises(ConfigError, match=r"vision.config.num_hiden_layers.*did you mean `num_hidden_layers`"):
        build(options(tokenizer_folders, vision=part))


def test_another_image_size_than_the_towers_is_refused(tokenizer_folders: Any) -> None:
    with pytest.raises(ConfigError, match=r"data.image_size is 16.*positions for 8 px"):
        build_processor(options(tokenizer_folders), image_size=16)


@pytest.fixture(scope="module")
def packaged() -> dict[str, Any]:
    names = ("efficientnet-lite0", "minilm-l6", "smollm2-135m-instruct")
    try:
        for name in names:
            packaged_folder(name)
    except (ConfigError, ImportError) as error:
        pytest.skip(str(error))
    return {
        "vision": {"model_name_or_path": "packaged:efficientnet-lite0"},
        "qformer": {"model_name_or_path": "packaged:minilm-l6", "num_query_tokens": 4, "max_text_tokens": 32},
        "language_model": {"model_name_or_path": "packaged:smollm2-135m-instruct", "config": {"num_hidden_layers": 2}},
        "guidance": {"initial_layer": 3, "contextual_layer": 5},
    }


def test_packaged_parts_make_a_model_that_trains(packaged: dict[str, Any]) -> None:
    from samtrain.core.batch import ImageGroups

    opts = ModelOptions.model_validate(packaged)
    processor: SamMllmProcessor = build_processor(opts, image_size=224)
    assert [round(m * 255) for m in processor.image_processor.image_mean] == [127] * 3
    model, report = build(opts)
    for part in ("vision", "qformer", "language_model"):
        assert report.parts[part].loaded and not report.parts[part].missing
    assert all(n == "query_tokens" or ".crossattention." in n for n in report.parts["qformer"].new)
    layer = model.qformer.encoder.layer[2]
    assert torch.equal(layer.output_query.dense.weight, layer.output.dense.weight)
    text = processor.encode(key="k", instruction="What is in both pictures?", output="A red fox.", num_images=2)
    out = model.train()(
        input_ids=torch.tensor(text.input_ids), labels=torch.tensor(text.labels),
        cu_seqlens=torch.tensor([0, text.num_tokens], dtype=torch.int32), pixel_values=torch.rand(2, 3, 224, 224),
        image_groups=ImageGroups.from_counts([2]), qformer_input_ids=torch.tensor([text.qformer_input_ids]),
    )  # fmt: skip
    out.loss_sum.backward()
    assert torch.isfinite(out.loss) and model.guidance.context_projection.weight.grad.abs().max() > 0


def test_the_packaged_language_model_speaks_english(packaged: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    folder = packaged_folder("smollm2-135m-instruct")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(new)
