"""How long collectives take between ranks: a bandwidth by the name of the link, and a latency a hop."""

from __future__ import annotations

from dataclasses import dataclass

# GB/s of a rank's collectives in which every byte crosses its own link, about nine tenths of the line: our assumption, to be
# replaced by what `--bandwidth` gives. Within a node it is always NVLink.
LINKS = {"nvlink": 300.0, "800g": 90.0, "400g": 45.0, "200g": 22.5, "100g": 11.0}
HOP_SECONDS = 5e-6  # from node to node along a ring; our assumption


@dataclass(frozen=True)
class Interconnect:
    """The ranks of a job. bandwidth: GB/s between nodes of a rank's collectives; None: by the link's name."""

    link: str
    nodes: int
    gpus_per_node: int
    bandwidth: float | None = None

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.nodes * self.gpus_per_node

    @property
    def gigabytes_per_second(self) -> float:
        """Of a rank's collectives."""
        if self.nodes == 1:
            return LINKS["nvlink"]
        return LINKS[self.link] if self.bandwidth is None else self.bandwidth

    def seconds(self, size: float) -> float:
        """Of an all-gather to, or a reduce-scatter of, `size` bytes: a ring, on which all but a rank's own part travels."""
        if self.ranks == 1 or not size:
            return 0.0
        share = (self.ranks - 1) / self.ranks
        return share * size / (self.gigabytes_per_second * 1e9) + self.nodes * HOP_SECONDS
