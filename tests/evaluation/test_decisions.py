"""Confusion, classes and early exit against counts done by hand."""

import contextlib
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from tetdist.evaluation import early_exit
from tetdist.evaluation.decisions import THRESHOLDS, Decisions
from tetdist.evaluation.early_exit import ExitChoice, choose_exit
from tetdist.evaluation.evaluate import _count
from tetdist.losses import running_means


def decide(world, *batches, outputs=2):
    found = Decisions(["a", "b"], outputs, len(batches[0][0]), torch.device("cpu"))
    for logits, labels in batches:
        found.add(logits, labels)
    found.gather(world)
    return found


def of_probabilities(*of_timesteps):
    """Logits (T, B, 2) whose running means give class 0 these probabilities, a list per
    timestep."""
    wanted = torch.tensor(of_timesteps, dtype=torch.float64)
    means = torch.stack([(wanted / (1 - wanted)).log(), torch.zeros_like(wanted)], -1)
    sums = means * torch.arange(1, len(means) + 1).view(-1, 1, 1)
    return torch.cat([sums[:1], sums.diff(dim=0)])


def test_a_sample_is_decided_when_it_is_sure_enough(alone):
    # Certain of a at once; of b at the second timestep; of a late, and first for b; never certain.
    logits = of_probabilities(
        [0.97, 0.45, 0.35, 0.55], [0.97, 0.15, 0.55, 0.45], [0.97, 0.02, 0.85, 0.48]
    )
    labels = torch.tensor([0, 1, 0, 1])
    found = decide(alone, (logits[:, :1], labels[:1]), (logits[:, 1:], labels[1:]))
    curve = {point.threshold: point for point in found.early_exit()}
    assert curve[0.5].exits == [4, 0, 0]
    assert curve[0.5].top1 == 50.0  # at t = 1 the third is taken for b, the fourth for a
    assert curve[0.7].exits == [1, 1, 2]
    assert curve[0.7].top1 == 100.0
    assert curve[0.7].mean_timesteps == (1 + 2 + 3 + 3) / 4
    assert curve[0.95].exits == [1, 0, 3]
    assert curve[0.999].exits == [0, 0, 4]
    assert curve[0.999].top1 == 100.0
    assert list(curve) == list(THRESHOLDS)


def test_a_sample_whose_confidence_is_the_threshold_is_decided():
    """Of a stream as of a whole pass."""
    stream = SimpleNamespace(step=lambda _: torch.zeros(1, 2))
    model = SimpleNamespace(stream=lambda: stream, timesteps=3, input_kind="images")
    _, exits = early_exit.decide(model, torch.zeros(1, 1), 0.5)
    assert exits.tolist() == [1]
    assert early_exit.first_sure(torch.full((3, 1), 0.5), 0.5).tolist() == [0]


def chosen(world, logits, labels, within, classes=("a", "b")):
    """The choice on a batch of two classes; without classes, it has no labels."""
    found = SimpleNamespace(samples=len(labels), top1=50.0)
    evaluator = SimpleNamespace(
        model=SimpleNamespace(num_classes=2, set_timesteps=lambda _: None),
        world=world,
        index=SimpleNamespace(classes=classes),
        run=lambda _, also: (also(logits, labels), found)[1],
    )
    return choose_exit(evaluator, len(logits), within)


def test_the_lowest_threshold_that_costs_little_from_there_on(alone, monkeypatch):
    # At t = 1 two samples are right and sure, one (0.6) is right only then, two (0.55 and 0.65)
    # only at T; five stay unsure. So 8 are right at T, and 7, 8, 7, 8 at the thresholds.
    monkeypatch.setattr(early_exit, "FINE_THRESHOLDS", (0.52, 0.57, 0.62, 0.8, math.inf))
    logits = of_probabilities(
        [0.9, 0.9, 0.6, 0.45, 0.35, *[0.51] * 5], [0.9, 0.9, 0.4, 0.6, 0.6, *[0.6] * 4, 0.4]
    )
    labels = torch.zeros(10, dtype=torch.int64)
    for within, threshold, lost in ((0, 0.8, 0), (9.9, 0.8, 0), (10, 0.52, 2)):
        expected = ExitChoice(within, threshold, 10, 50.0, lost)
        assert chosen(alone, logits, labels, within) == expected
    # A sample that is sure of a wrong class at once: no threshold costs so little.
    logits[0, 0], logits[1, 0] = torch.tensor([-9.0, 9.0]), torch.tensor([20.0, -20.0])
    assert chosen(alone, logits, labels, 5).threshold == math.inf


def test_without_labels_the_decision_at_t_counts_as_right(alone):
    # The first is right only before T, the last only at T; the decisions between do not change.
    logits = of_probabilities([0.75, 0.8, 0.15, 0.5], [0.2, 0.9, 0.1, 0.45])
    labels = torch.tensor([0, 0, 0, 1])
    # With labels, the first makes up for the last. The next tried above 0.5 and 0.75 are these.
    assert chosen(alone, logits, labels, 0) == ExitChoice(0, 0.3, 4, 50.0, 1)
    for within, threshold, changed in ((0, 0.755925, 0), (25, 0.54073, 1), (50, 0.3, 2)):
        found = chosen(alone, logits, labels, within, classes=())
        assert found == ExitChoice(within, threshold, 4, None, changed)


def test_rates_of_early_exit_are_those_of_all_processes(monkeypatch):
    """Each of three has a batch of two samples; a decision takes 1 s, a whole pass 3 s."""
    ticks = itertools.cycle((0.0, 1.0, 4.0))
    monkeypatch.setattr(early_exit.time, "perf_counter", lambda: next(ticks))
    logits, labels = of_probabilities([0.97, 0.45], [0.97, 0.15]), torch.tensor([0, 1])
    batch = SimpleNamespace(inputs=lambda *_: logits, labels=labels)
    loaded = contextlib.nullcontext([batch])
    monkeypatch.setattr(early_exit, "eval_loader", lambda *_: loaded)
    decided = torch.tensor([0, 1]), torch.tensor([1, 2])
    monkeypatch.setattr(early_exit, "decide", lambda *_: decided)
    model = SimpleNamespace(eval=lambda: lambda images, **_: images)
    world = SimpleNamespace(device=torch.device("cpu"), world_size=3, wait_for_device=lambda: None)
    world.sum = lambda values: [3 * value for value in values]
    config = SimpleNamespace(precision="fp64", batch=SimpleNamespace(eval=2))
    parts = {"model": model, "world": world, "config": config, "index": None}
    found = early_exit.measure_exit(SimpleNamespace(**parts, alive=lambda: None), 0.7)
    rates = found.images_per_s, found.whole_pass_images_per_s, found.ratio
    assert rates == (6.0, 2.0, 3.0)
    assert (found.top1, found.mean_timesteps, found.differing) == (100.0, 1.5, 0)


def test_confusion_and_classes(alone):
    logits = torch.zeros(2, 5, 3)
    for sample, decided in enumerate((0, 1, 1, 2, 0)):
        logits[0, sample, (decided + 1) % 3] = 1  # of the mean, the second timestep decides
        logits[1, sample, decided] = 5
    found = decide(alone, (logits, torch.tensor([0, 0, 1, 0, 0])), outputs=3)
    assert found.classes == ["a", "b", "output 2"]
    assert found.confusion.tolist() == [[2, 1, 1], [0, 1, 0], [0, 0, 0]]
    a, b, spare = found.per_class()
    assert (a.samples, a.recall, a.precision) == (4, 50.0, 100.0)
    assert (a.mistaken_for, a.mistaken) == ("b", 1)
    assert (b.samples, b.recall, b.precision) == (1, 100.0, 50.0)
    assert (b.mistaken_for, b.mistaken) == (None, 0)
    assert (spare.samples, spare.recall, spare.precision) == (0, None, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_running_means_are_those_of_cumsum(dtype):
    """Bitwise equal to cumsum, which is not used because it is not deterministic on a GPU."""
    logits = torch.randn(9, 5, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = logits.to(torch.promote_types(dtype, torch.float32))
    steps = torch.arange(1, 10, dtype=wide.dtype).view(-1, 1, 1)
    assert torch.equal(running_means(logits), wide.cumsum(0) / steps)


def test_of_equal_logits_the_first_class_is_ahead():
    # 12 classes with three logits between them: half of the samples have several highest ones.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (2, 500, 12), generator=generator).bfloat16()
    labels = torch.randint(0, 12, (500,), generator=generator)
    counts = _count(logits, labels)
    order = running_means(logits).sort(dim=-1, descending=True, stable=True).indices
    for row, places in ((0, 1), (1, 5)):
        right = (order[..., :places] == labels.view(1, -1, 1)).any(-1).sum(-1)
        assert counts[row].tolist() == right.tolist()
    decisions = Decisions([str(i) for i in range(12)], 12, 2, torch.device("cpu"))
    decisions.add(logits, labels)
    points = decisions.early_exit()
    never = next(point for point in points if point.mean_timesteps == 2)
    assert never.top1 == 100 * counts[0, -1].item() / 500


def test_what_is_not_a_number_is_never_right():
    logits = torch.zeros(1, 3, 6)
    logits[0, 0, 2] = logits[0, 1, 3] = logits[0, 2] = math.nan
    labels = torch.tensor([2, 0, 0])
    counts = _count(logits, labels)
    assert counts[:2].tolist() == [[0.0], [1.0]]  # the second sample's class is behind the one
    found = Decisions([str(i) for i in range(6)], 6, 1, torch.device("cpu"))
    found.add(logits, labels)
    assert [point.top1 for point in found.early_exit()] == [0.0] * len(THRESHOLDS)
    assert [row.recall for row in found.per_class()[:3:2]] == [0.0, 0.0]
