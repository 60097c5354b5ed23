"""Time that a kind of GPU needs for counted work (count.py). Computed, not measured.

A kernel takes the time of its bytes at the memory's bandwidth, or of its operations at the speed of
arithmetic, whichever is longer; kernels run one after another. A kernel with fewer programs than
the GPU has processors reaches only their part of the bandwidth. Neither speed is ever fully
reached, so each is multiplied by a fraction. The fractions are fitted: the estimate is within a
tenth of NVIDIA's measured rates of a ReLU ResNet-50 on an A100 and a V100 (DeepLearningExamples,
PyTorch, 2021), and of MLPerf's rates of other GPUs relative to an A100;
tests/roofline/test_estimate.py compares them. One host thread launches all kernels; its time is an
estimate. The loss, the update, the processes' own work and loading are left out and make a step
longer.
"""

from collections import defaultdict
from dataclasses import dataclass

from tetdist.apps.roofline.cards import Card
from tetdist.apps.roofline.count import Work
from tetdist.errors import UserError

# Fractions of the memory's bandwidth, and of the arithmetic of each type, that are reached.
BANDWIDTH_SHARE = 0.8
ARITHMETIC_SHARES = {"fp32": 0.7, "tf32": 0.25, "bf16": 0.4, "fp16": 0.4}
# Time of Python, torch and Triton to launch a kernel.
LAUNCH_SECONDS = 12e-6
# Launches of the graph itself, two copies of its input, and the sums for the metrics.
LAUNCHES_OF_GRAPH = 5


@dataclass(frozen=True)
class Estimate:
    """Time of a micro-batch, forward and backward.

    Attributes:
        by_kind: Seconds of each group of kernels.
        memory: Seconds of memory-bound kernels.
        arithmetic: Seconds of compute-bound kernels.
        launches: Seconds that the host needs to launch all kernels, in parallel to the GPU.
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
    """Return the time of counted work on a card.

    With ``as_graph`` the host launches all kernels at once (training/graphs.py).

    Raises:
        UserError: The card's speed in this precision is unknown.
    """
    peak = card.arithmetic(work.precision)
    if peak is None:
        raise UserError(
            f"the plan does not know the speed of a {card.name} in precision={work.precision}; "
            "choose another precision"
        )
    bandwidth = 1e9 * card.bandwidth * BANDWIDTH_SHARE
    speed = 1e12 * peak * ARITHMETIC_SHARES[work.precision] * card.reached
    by_kind: defaultdict[str, float] = defaultdict(float)
    memory = arithmetic = 0.0
    for kernel in work.kernels:
        part = min(1.0, (kernel.programs or card.processors) / card.processors)
        moving, computing = kernel.bytes / (bandwidth * part), kernel.operations / speed
        by_kind[kernel.kind] += max(moving, computing)
        if moving >= computing:
            memory += moving
        else:
            arithmetic += computing
    launches = LAUNCHES_OF_GRAPH if as_graph else len(work.kernels)
    return Estimate(work.batch, dict(by_kind), memory, arithmetic, launches * LAUNCH_SECONDS)
