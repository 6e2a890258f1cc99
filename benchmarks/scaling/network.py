"""How long a collective takes: NCCL's rings over NVLink inside a node and one network card for every GPU between nodes.

A ring passes every GPU once, and there are as many rings as cards, each crossing the network through another one. So a
node's cards work together, and an all-gather of M bytes lasts

    M (W - 1) / W / min(NVLink, cards of a node together) / efficiency + base + steps x latency

The latency of a ring grows with the ranks; its terms are those of NCCL's own cost model (ring, protocol Simple).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """Bytes and seconds. nvlink: one direction of a GPU. card: one direction of a GPU's share of the network."""

    gpus_per_node: int = 8
    nvlink: float = 450e9  # NVLink 4: 900 GB/s both ways
    card: float = 50e9  # 400 Gb/s InfiniBand or RoCE
    efficiency: float = 0.8  # of the link, for large messages
    base: float = 8.4e-6
    latency_inside: float = 3.4e-6  # a step between GPUs of a node
    latency_between: float = 14.0e-6  # a step between nodes

    def seconds(self, num_bytes: float, world_size: int) -> float:
        """An all-gather to, or a reduce-scatter from, `num_bytes` on every one of `world_size` GPUs, nodes full."""
        if world_size == 1 or num_bytes == 0:
            return 0.0
        nodes = max(1, world_size // self.gpus_per_node)
        inside = min(world_size, self.gpus_per_node)
        bandwidth = self.nvlink if nodes == 1 else min(self.nvlink, self.card * inside)
        steps_between = nodes - 1 if nodes > 1 else 0
        latency = (world_size - 1 - steps_between) * self.latency_inside + steps_between * self.latency_between
        return num_bytes * (world_size - 1) / world_size / (bandwidth * self.efficiency) + self.base + latency

    def describe(self) -> str:
        return (
            f"{self.gpus_per_node} GPUs a node, NVLink {self.nvlink / 1e9:.0f} GB/s one way, a card of "
            f"{8 * self.card / 1e9:.0f} Gb/s for every GPU, {100 * self.efficiency:.0f} % of them reached; a ring's "
            f"step takes {1e6 * self.latency_inside:.1f} us inside a node, {1e6 * self.latency_between:.1f} us else"
        )
