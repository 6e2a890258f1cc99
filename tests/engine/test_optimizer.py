import itertools
import math

import pytest
import torch
from torch import nn

from samtrain.engine.optimizer import build_parameter_groups, learning_rate_factor, num_warmup_steps
from samtrain.engine.options import TrainOptions


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision = nn.Linear(3, 3)
        self.qformer = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
        self.qformer[0].bias.requires_grad_(False)


def groups_of(model, **options):
    named = model.named_parameters()
    return {g["name"]: g for g in build_parameter_groups(named, TrainOptions(**options), lambda n: n.split(".")[0])}


def test_one_dimensional_parameters_are_not_decayed_and_frozen_ones_absent():
    model = Model()
    groups = groups_of(model, weight_decay=0.1)
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "vision": 0.1,
        "vision/no_decay": 0.0,
        "qformer": 0.1,
        "qformer/no_decay": 0.0,
    }
    assert [tuple(p.shape) for p in groups["qformer/no_decay"]["params"]] == [(3,), (3,)]  # the norm, not the bias
    assert not any(p is model.qformer[0].bias for group in groups.values() for p in group["params"])


def test_decay_follows_the_whole_shape_of_a_partitioned_parameter():
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_shape = torch.Size([4, 4])
    (group,) = build_parameter_groups([("vision.weight", parameter)], TrainOptions(), lambda name: "vision")
    assert group["name"] == "vision" and group["weight_decay"] > 0


def test_parts_have_their_own_rates():
    groups = groups_of(Model(), learning_rate=1e-3, learning_rates={"qformer": 5e-4})
    assert groups["vision"]["lr"] == groups["vision"]["initial_lr"] == 1e-3
    assert groups["qformer"]["lr"] == groups["qformer/no_decay"]["initial_lr"] == 5e-4


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedule_warms_up_to_one_and_never_stands_still_at_zero(kind):
    options = TrainOptions(warmup_steps=4, lr_scheduler_type=kind)
    factors = [learning_rate_factor(step, options, 20) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(0 < later <= earlier for earlier, later in itertools.pairwise(factors[3:]))
    assert (factors[-1] == 1.0) == (kind == "constant")


def test_cosine_and_linear_equal_their_formulas():
    for step in range(2, 12):
        progress = (step - 2) / 10
        options = TrainOptions(warmup_steps=2, min_lr_ratio=0.1)
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
        assert learning_rate_factor(step, options, 12) == pytest.approx(expected)
        linear = TrainOptions(warmup_steps=2, min_lr_ratio=0.1, lr_scheduler_type="linear")
        assert learning_rate_factor(step, linear, 12) == pytest.approx(1 - 0.9 * progress)
    assert learning_rate_factor(500, options, 12) == pytest.approx(0.1)


def test_warmup_ratio_counts_where_no_steps_are_given():
    assert num_warmup_steps(TrainOptions(warmup_ratio=0.05), 101) == 6
    assert num_warmup_steps(TrainOptions(warmup_ratio=0.05, warmup_steps=0), 101) == 0
    assert learning_rate_factor(0, TrainOptions(warmup_steps=0), 10) == 1.0
