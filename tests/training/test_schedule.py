"""Learning rates at the places where they bend, and the phases' borders."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from tetdist.config.sections.phase import OptimizerSection, PhaseSection
from tetdist.training.schedule import Phase, phase_at
from tetdist.training.schedule import schedule_phases as schedule


def schedule_phases(sections: tuple[PhaseSection, ...], steps_per_epoch: int) -> list[Phase]:
    return schedule(sections, steps_per_epoch, 8)


def section(**values: Any) -> PhaseSection:
    optimizer = OptimizerSection(lr=values.pop("lr", 0.8))
    return PhaseSection(**{"epochs": 4, "timesteps": 2, "optimizer": optimizer} | values)


def test_cosine_goes_from_the_peak_towards_zero():
    (phase,) = schedule_phases((section(),), 10)
    rates = [phase.learning_rate(step) for step in range(40)]
    assert rates[0] == 0.8
    assert rates[20] == pytest.approx(0.4)
    assert rates[39] == pytest.approx(0.8 * 0.5 * (1 + math.cos(math.pi * 39 / 40)))
    assert 0 < rates[39] < 0.01 * 0.8
    assert phase.learning_rate(40) == pytest.approx(0, abs=1e-12)
    assert all(later < earlier for earlier, later in pairwise(rates))


def test_warm_up_rises_by_equal_steps_and_ends_at_the_peak():
    (phase,) = schedule_phases((section(warmup_epochs=1.0),), 10)
    rates = [phase.learning_rate(step) for step in range(40)]
    assert rates[:10] == pytest.approx([0.08 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(0.8)
    assert max(rates) <= 0.8 + 1e-12
    assert rates[25] == pytest.approx(0.4)


def test_phases_follow_each_other():
    phases = schedule_phases((section(), section(epochs=2, timesteps=3, lr=0.1)), 10)
    assert [(phase.first_step, phase.end_step) for phase in phases] == [(0, 40), (40, 60)]
    assert [phase_at(phases, step).number for step in (0, 39, 40, 59, 60, 1000)] == [
        0,
        0,
        1,
        1,
        1,
        1,
    ]
    assert phases[1].learning_rate(40) == 0.1
    assert phases[1].learning_rate(50) == pytest.approx(0.05)


def of_timm(epochs: int, **values: Any) -> list[float]:
    """The learning rate that timm's cosine has in each epoch."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.8)
    scheduler = CosineLRScheduler(optimizer, **values)
    rates = [optimizer.param_groups[0]["lr"]]
    for epoch in range(1, epochs):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


WARM = {"warmup_epochs": 3.0, "warmup_lr": 0.01}
WARM_AT_TIMM = {"warmup_t": 3, "warmup_lr_init": 0.01, "warmup_prefix": False}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        pytest.param(
            WARM | {"min_lr": 0.05, "cooldown_epochs": 2, "clock_after_warmup": False},
            lambda: of_timm(12, t_initial=10, lr_min=0.05, **WARM_AT_TIMM),
            id="cosine",
        ),
        pytest.param(
            WARM | {"min_lr": 0.05, "cooldown_epochs": 2},
            lambda: of_timm(
                12,
                t_initial=7,  # timm's are the epochs after the warm-up then
                lr_min=0.05,
                **(WARM_AT_TIMM | {"warmup_prefix": True}),
            ),
            id="cosine after the warm-up",
        ),
    ],
)
def test_epochs_learn_at_the_rates_of_timm(ours, theirs):
    (phase,) = schedule_phases((section(epochs=12, lr_changes="epochs", **ours),), 10)
    rates = [phase.learning_rate(step) for step in range(120)]
    assert rates[::10] == pytest.approx(theirs(), rel=1e-12)
    assert rates == [rates[step // 10 * 10] for step in range(120)]


def test_a_rate_per_256_is_scaled_and_reported():
    optimizer = OptimizerSection(lr=6e-4, lr_per=256)
    phase = PhaseSection(epochs=1, timesteps=1, optimizer=optimizer, schedule="constant")
    (of_2048,) = schedule((phase,), 10, 2048)
    assert of_2048.learning_rate(0) == pytest.approx(4.8e-3)
    assert optimizer.lr_as_text(2048) == "0.0048 (0.0006 per 256)"
    assert section().optimizer.lr_as_text(2048) == "0.8"
