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

from tetdist.apps.roofline.cards import Card
from tetdist.apps.roofline.count import Work
from tetdist.errors import UserError

# Of the memory's bandwidth, and of the arithmetic of each type.
BANDWIDTH_SHARE = 0.8
ARITHMETIC_SHARES = {"fp32": 0.7, "tf32": 0.25, "bf16": 0.4, "fp16": 0.4}
# What Python, torch and Triton take to start a kernel.
LAUNCH_SECONDS = 12e-6
# Beside the graph itself two copies of its input, and the sums for the metrics.
LAUNCHES_OF_GRAPH = 5


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


def estimate(work: Work, card: Card, *, as_graph: bool = False) -> Estimate:
    """The time of counted work on a card.

    With ``as_graph`` the host starts all kernels at once (training/graphs.py).

    Raises:
        UserError: The card has no arithmetic for that precision.
    """
    peak = card.arithmetic(work.precision)
    if peak is None:
        raise UserError(
            f"the plan knows no arithmetic of a {card.name} for precision={work.precision}; take "
            "another precision"
        )
    bandwidth = 1e9 * card.bandwidth * BANDWIDTH_SHARE
    speed = 1e12 * peak * ARITHMETIC_SHARES[work.precision] * card.reached
    by_kind: defaultdict[str, float] = defaultdict(float)
    memory = arithmetic = 0.0
    for kernel in work.kernels:
        moving, computing = kernel.bytes / bandwidth, kernel.operations / speed
        by_kind[kernel.kind] += max(moving, computing)
        if moving >= computing:
            memory += moving
        else:
            arithmetic += computing
    launches = LAUNCHES_OF_GRAPH if as_graph else len(work.kernels)
    return Estimate(work.batch, dict(by_kind), memory, arithmetic, launches * LAUNCH_SECONDS)
