"""The event simulation against cases that can be worked out on paper."""

import pytest

from benchmarks.scaling.network import Network
from benchmarks.scaling.simulate import Bucket, simulate


def run(buckets: list[Bucket], *, per_element: float, live: float = 1e9):
    def seconds(n: int) -> float:
        return n * per_element

    return simulate(buckets, gather=seconds, gather_again=seconds, reduce=seconds, max_live_elements=live)


def test_without_communication_a_step_is_its_compute() -> None:
    buckets = [Bucket(10, 10, 10, 1.0, 2.0)] * 5
    found = run(buckets, per_element=0.0)
    assert (found.total, found.compute, found.exposed, found.busy) == (15.0, 15.0, 0.0, 0.0)


def test_without_compute_a_step_is_its_communication() -> None:
    found = run([Bucket(10, 10, 5, 0.0, 0.0)] * 4, per_element=0.1)
    assert found.total == pytest.approx(4 * (1.0 + 1.0 + 0.5)) == found.busy


def test_only_the_first_gather_of_each_pass_is_exposed_where_compute_is_longer() -> None:
    found = run([Bucket(10, 10, 0, 2.0, 4.0)] * 6, per_element=0.1)
    assert found.total == pytest.approx(6 * 6.0 + 2 * 1.0)


def test_where_gathers_are_longer_the_step_is_theirs_and_the_last_compute() -> None:
    found = run([Bucket(10, 0, 0, 0.25, 0.0)] * 6, per_element=0.1)
    assert found.total == pytest.approx(6 * 1.0 + 0.25)


def test_with_room_for_one_bucket_nothing_overlaps() -> None:
    found = run([Bucket(10, 0, 0, 1.0, 0.0)] * 4, per_element=0.1, live=10)
    assert found.total == pytest.approx(4 * 2.0)


def test_gradients_are_reduced_while_the_next_bucket_computes() -> None:
    found = run([Bucket(0, 0, 10, 0.0, 2.0)] * 3, per_element=0.1)
    assert found.total == pytest.approx(3 * 2.0 + 1.0)  # the last reduction has nothing to hide behind


def test_a_ring_within_a_node_and_between_nodes() -> None:
    network = Network(efficiency=1.0, base=0.0, latency_inside=0.0, latency_between=0.0)
    assert network.seconds(1e9, 1) == 0.0
    assert network.seconds(1e9, 8) == pytest.approx(7 / 8 * 1e9 / 450e9)
    assert network.seconds(1e9, 64) == pytest.approx(63 / 64 * 1e9 / 400e9)  # eight cards of 50 GB/s
    slow = Network(efficiency=1.0, base=1e-5, latency_inside=1e-6, latency_between=1e-5)
    assert slow.seconds(8.0, 64) == pytest.approx(1e-5 + 56e-6 + 7e-5, rel=1e-4)
