"""The real model under the engine: ranks with many images, few and none, gradient checkpointing, frozen towers."""

import pytest

PAPER = {"guidance": True, "qformer": True, "projection": True}
EVERYTHING = {"guidance": True, "vision": True, "qformer": True, "language_model": "full"}
ZERO = {"param_persistence_threshold": 0}


@pytest.mark.parametrize(
    ("world_size", "trained", "zero", "kernels", "compiles_vision", "context"),
    [
        (2, PAPER, ZERO | {"frozen_towers": "replicated"}, "reference", True, "others"),
        (2, {"guidance": True}, ZERO | {"frozen_towers": "partitioned"}, "reference", True, "others"),
        (2, PAPER, ZERO | {"frozen_towers": "partitioned"}, "materialised", False, "others"),
        (2, PAPER, ZERO | {"frozen_towers": "partitioned"}, "reference", False, "own"),
        (3, EVERYTHING, {}, "reference", False, "others"),
    ],
)
def test_real_model_trains_as_in_one_process_of_plain_torch(
    launch, tmp_path, world_size, trained, zero, kernels, compiles_vision, context
):
    """Plain torch runs the materialised path: so ZeRO-3 gathers whatever the kernels' path calls, and updates it."""
    outcome = launch(
        "multimodal",
        world_size=world_size,
        output_dir=str(tmp_path),
        trained=trained,
        zero_options=zero,
        kernels=kernels,
        compiles_vision=compiles_vision,
        context=context,
    )
    for result in outcome.check().results:
        # Two layers, one graph: for one image (the dummy), and for several.
        assert (0 < result["compilations"] <= 2) if compiles_vision else result["compilations"] == 0
        assert (result["layer_calls"] > 0) is (kernels == "materialised")
        assert result["engine"] == pytest.approx(result["plain"], rel=1e-5)
        assert max(result["plain"]) - min(result["plain"]) > 1e-3
    assert outcome.results[0]["weight_difference"] < 1e-4  # the learning rate is 1e-2
