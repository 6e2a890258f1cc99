"""What a checkpoint holds is the state of the moment it was begun in."""

import logging

import pytest
import torch

from samtrain.engine.fragments import KINDS
from samtrain.engine.host_copy import HostCopy
from samtrain.engine.zero import Fragment

NUMELS = {"a": 5, "none": 0, "b": 7, "large": 40, "c": 1}


def fragments() -> list[Fragment]:
    return [
        Fragment(name, (2 * numel,), 0, numel, *(torch.randn(numel) for _ in KINDS)) for name, numel in NUMELS.items()
    ]


@pytest.mark.parametrize("block_elements", [1, 16, 2**20])
def test_keeps_the_values_of_the_moment(block_elements):
    live = fragments()
    copy = HostCopy(live, pin=False, block_elements=block_elements)
    for _ in range(2):  # the buffers are used again
        expected = {f"{one.name}/{kind}": getattr(one, kind).clone() for one in live for kind in KINDS if one.stop}
        copy.take(live)
        for one in live:
            for kind in KINDS:
                getattr(one, kind).add_(1.0)
        assert copy.tensors.keys() == expected.keys() and "none/master" not in copy.tensors
        assert all(torch.equal(copy.tensors[name], value) for name, value in expected.items())


def test_takes_twelve_bytes_an_element_in_blocks_that_no_tensor_exceeds():
    copy = HostCopy(fragments(), pin=False, block_elements=16)
    assert copy.num_bytes == 12 * sum(NUMELS.values())
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in copy.tensors.values()}

    assert all(size <= 16 or size == 40 for size in sizes.values())


def test_memory_that_cannot_be_page_locked_serves_as_it_is(caplog):
    if torch.cuda.is_available():
        pytest.skip("here it can")
    live = fragments()
    with caplog.at_level(logging.WARNING, logger="samtrain"):
        copy = HostCopy(live, pin=True)
    copy.take(live)
    assert torch.equal(copy.tensors["large/exp_avg"], live[3].exp_avg)
    assert [record.message for record in caplog.records if "ordinary host memory" in record.message]


def test_a_rank_that_owns_nothing_copies_nothing():
    copy = HostCopy([Fragment("none", (1,), 1, 1, *(torch.empty(0) for _ in KINDS))], pin=False)
    copy.take([])
    assert copy.tensors == {}
