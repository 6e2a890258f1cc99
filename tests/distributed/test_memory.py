"""What `zero_memory` says a rank holds is what DeepSpeed holds, byte for byte, on a model whose sizes divide by two."""

import pytest


@pytest.mark.parametrize("offload", ["none", "optimizer", "all"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("frozen_towers", ["replicated", "partitioned"])
def test_deepspeed_holds_what_the_arithmetic_says(launch, precision: str, offload: str, frozen_towers: str) -> None:
    zero = {"offload": offload, "frozen_towers": frozen_towers, "param_persistence_threshold": 0}
    zero |= {"reduce_bucket_size": 1000, "prefetch_bucket_size": 0, "max_reuse_distance": 0}
    outcome = launch("held", world_size=2, options={"precision": precision, "zero": zero}).check()
    for rank in outcome.results:
        found, said = rank["found"], rank["said"]
        if offload == "none":
            assert found == {kind: said[kind] for kind in found}
            assert said["host"] == 0
        elif offload == "optimizer":
            assert found["weights"] == said["weights"]
            assert found["optimizer"] + found["gradients"] == said["host"]
        else:
            assert sum(found.values()) == said["host"]
