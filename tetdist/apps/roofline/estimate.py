"""The time that a kind of GPU takes for counted work (count.py). Computed, not measured.

A kernel takes as long as its bytes at the memory's bandwidth, or as its operations at the speed of
arithmetic, whichever is longer; kernels run one after another. Neither is ever reached in full, so
that each is taken at a share. The shares are such that the same arithmetic gives, within a tenth,
the rates that NVIDIA has measured of a ReLU ResNet-50 on an A100 and a V100 (DeepLearningExamples,
PyTorch, 2021), and MLPerf's of others relative to an A100: tests/roofline/test_estimate.py compares
them. All kernels are started by one thread, which takes its time, too; how long is an estimate.
What is left out (the loss, the update, the processes' own work, loading) makes a step longer.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from tetdist.apps.roofline.cards import Card
from tetdist.apps.roofline.count import Kernel, Work

# Of the memory's bandwidth, and of the arithmetic of each type.
BANDWIDTH_SHARE = 0.8
ARITHMETIC_SHARES = {"fp32": 0.7, "tf32": 0.25, "bf16": 0.4, "fp16": 0.4}
# What Python, torch and Triton take to start a kernel.
LAUNCH_SECONDS = 12e-6
# Beside the graph itself two copies of its input, and the sums for the metrics.
LAUNCHES_OF_GRAPH = 5

Bound = Literal["memory", "arithmetic", "launches"]


@dataclass(frozen=True)
class Estimate:
    """The time of a micro-batch, forward and backward.

    Attributes:
        batch: Samples.
        by_kind: Seconds of each part.
        memory: Seconds of the kernels that wait for memory.
        arithmetic: Seconds of those that wait for arithmetic.
        launches: Seconds that the host takes to start all kernels, while others run.
    """

    batch: int
    by_kind: dict[str, float]
    memory: float
    arithmetic: float
    launches: float

    @property
    def seconds(self) -> float:
        return max(self.memory + self.arithmetic, self.launches)

    @property
    def images_per_s(self) -> float:
        return self.batch / self.seconds

    @property
    def bound(self) -> Bound:
        """The resource that limits most of the time."""
        if self.launches > self.memory + self.arithmetic:
            return "launches"
        return "memory" if self.memory > self.arithmetic else "arithmetic"


def estimate(work: Work, card: Card, *, as_graph: bool = False) -> Estimate | None:
    """The time of counted work on a card; None: it has no arithmetic for that precision.

    With ``as_graph`` the host starts all kernels at once (training/graphs.py).
    """
    by_kind: defaultdict[str, float] = defaultdict(float)
    by_bound: defaultdict[Bound, float] = defaultdict(float)
    speed = operations_per_s(card, work.precision)
    if speed is None:
        return None
    for kernel in work.kernels:
        memory, arithmetic = memory_seconds(kernel, card), kernel.operations / speed
        by_kind[kernel.kind] += max(memory, arithmetic)
        by_bound["memory" if memory >= arithmetic else "arithmetic"] += max(memory, arithmetic)
    count = LAUNCHES_OF_GRAPH if as_graph else sum(kernel.launches for kernel in work.kernels)
    launches = count * LAUNCH_SECONDS
    return Estimate(work.batch, dict(by_kind), by_bound["memory"], by_bound["arithmetic"], launches)


def memory_seconds(kernel: Kernel, card: Card) -> float:
    """Seconds that a card takes to read and write what a kernel does."""
    return kernel.bytes / (1e9 * card.bandwidth * BANDWIDTH_SHARE)


def arithmetic_share(card: Card, precision: str) -> float:
    """Share of a card's arithmetic that convolutions are taken to reach."""
    return ARITHMETIC_SHARES[precision] * card.reached


def operations_per_s(card: Card, precision: str) -> float | None:
    """Operations a second that convolutions are taken to reach; None: see `estimate`."""
    peak = card.arithmetic(precision)
    return None if peak is None else 1e12 * peak * arithmetic_share(card, precision)
