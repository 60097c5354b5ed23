"""The roofline: what bounds it, and that it is right where somebody has measured."""

import dataclasses

import pytest
import timm
from kernel_runs import needs_triton

from tetdist.apps.roofline.cards import CARDS
from tetdist.apps.roofline.count import Kernel, Work, count
from tetdist.apps.roofline.estimate import estimate
from tetdist.errors import UserError

needs_triton()

# NVIDIA DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5: training performance,
# one GPU, measured in container 21.03. "Mixed precision" is float16.
PUBLISHED = [
    ("A100-80", "fp16", 256, 2470),
    ("A100-80", "tf32", 256, 938),
    ("V100", "fp16", 256, 1200),
    ("V100", "fp32", 128, 367),
    ("V100-32", "fp16", 256, 1156),
    ("V100-32", "fp32", 128, 356),
]


@pytest.mark.parametrize(("name", "precision", "batch", "images_per_s"), PUBLISHED)
def test_published_rates_of_a_relu_network(name, precision, batch, images_per_s):
    work = count(timm.create_model("resnet50"), (batch, 3, 224, 224), precision)
    found = estimate(work, CARDS[name])
    assert found.images_per_s == pytest.approx(images_per_s, rel=0.12)


# MLPerf Training, closed division, ResNet-50 on one node, by the throughputs in the logs, images a
# second. v3.0 (May 2023), Dell: 28,610 of 8 A100-80, 56,050 of 8 H100, 18,900 of 4 H100-PCIe. v4.0
# (April 2024): NVIDIA's 57,260 of 8 H100 and 63,550 of 8 H200, Dell's 57,100 of 8 H100 and 8,735 of
# 4 L40S. Here for one GPU, as multiples of an A100's; those of v4.0 by way of the H100.
RATIOS = {"H100": 1.96, "H100-PCIe": 1.32, "H200": 2.17, "L40S": 0.60}


def test_published_ratios_of_a_relu_network():
    work = count(timm.create_model("resnet50"), (256, 3, 224, 224), "fp16")
    a100 = estimate(work, CARDS["A100-80"]).images_per_s
    found = {name: estimate(work, CARDS[name]).images_per_s / a100 for name in RATIOS}
    assert found == pytest.approx(RATIOS, rel=0.1)


def work_of(*kernels):
    return Work(32, "bf16", kernels, 0)


CARD = CARDS["H100"]
MOVES = Kernel("a", "moves", bytes=10**9)
COMPUTES = Kernel("b", "computes", bytes=10, operations=10**12)


def faster(**times):
    changed = {name: getattr(CARD, name) * by for name, by in times.items()}
    return dataclasses.replace(CARD, **changed)


def test_each_kernel_waits_for_what_takes_longer():
    moves, computes = (estimate(work_of(kernel), CARD) for kernel in (MOVES, COMPUTES))
    assert moves.arithmetic == computes.memory == 0
    both = estimate(work_of(MOVES, COMPUTES), CARD)
    assert both.seconds == pytest.approx(moves.memory + computes.arithmetic)
    assert both.by_kind == pytest.approx({"a": both.memory, "b": both.arithmetic})
    # Only what bounds it makes it faster.
    for kernel, helps, not_ in ((MOVES, "bandwidth", "bf16"), (COMPUTES, "bf16", "bandwidth")):
        before = estimate(work_of(kernel), CARD).seconds
        assert estimate(work_of(kernel), faster(**{helps: 2})).seconds == pytest.approx(before / 2)
        assert estimate(work_of(kernel), faster(**{not_: 2})).seconds == before


def test_few_programs_reach_a_part_of_the_bandwidth():
    for programs, times in ((CARD.processors // 4, 4), (CARD.processors, 1), (10_000, 1)):
        found = estimate(work_of(dataclasses.replace(MOVES, programs=programs)), CARD)
        assert found.memory == pytest.approx(times * estimate(work_of(MOVES), CARD).memory)


def test_many_small_kernels_wait_for_the_host():
    small = work_of(*[Kernel("a", "small", bytes=1000)] * 1000)
    found = estimate(small, CARD)
    assert found.seconds == found.launches > found.memory
    assert estimate(small, CARD, as_graph=True).launches == found.launches / 200
    # Of larger ones as many are started while the GPU is busy.
    found = estimate(work_of(*[MOVES] * 1000), CARD)
    assert found.seconds == found.memory > found.launches


def test_a_card_without_arithmetic_for_a_precision():
    for card, precision in ((CARDS["V100"], "bf16"), (CARD, "fp64")):
        with pytest.raises(UserError, match=f"the speed of a {card.name} in precision="):
            estimate(dataclasses.replace(work_of(MOVES), precision=precision), card)
    for precision in ("fp32", "fp16"):
        estimate(dataclasses.replace(work_of(MOVES), precision=precision), CARDS["V100"])
