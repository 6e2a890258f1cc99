import json

import pytest

from samtrain.core.errors import CheckpointError
from samtrain.engine.state import TrainState


def test_state_survives_json():
    state = TrainState(global_step=3, cursor={"epoch": 1, "next": [2, 4]}, best_metric=0.5, tracker_run_id="abc")
    assert TrainState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


def test_state_of_another_version_is_refused():
    with pytest.raises(CheckpointError, match="num_moons"):
        TrainState.from_dict({"num_moons": 2})
