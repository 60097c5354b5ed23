"""A run whose loss turns and whose steps draw their T, against a loop written by hand."""

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import expect

from tetdist import order
from tetdist.config.loading import load
from tetdist.data.build import train_loader
from tetdist.datasets.index import index_file, load_index
from tetdist.distributed.world import World
from tetdist.tracking.progress import RunProgress

EPOCH = tiny.STEPS_PER_EPOCH
OPTIMIZER = {"kind": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
TO_TET = [
    {"epochs": 1, "timesteps": {"from": 1, "to": 4}, "loss": {"kind": "sdt"}}
    | {"optimizer": OPTIMIZER, "min_lr": 0.001},
    {"epochs": 1, "timesteps": [2, 4], "optimizer": "continue"},
]
FROM_TET = [TO_TET[0] | {"loss": {}}, TO_TET[1] | {"loss": {"kind": "sdt"}}]
# By seed, and never to be others: old runs depend on them.
DRAWN = {0: [4, 2, 4, 4, 2, 4, 2, 2, 4, 2], 7: [4, 2, 3, 1, 4, 2, 2, 2, 4, 4]}


@pytest.mark.parametrize("seed", DRAWN)
def test_steps_draw_what_they_always_did(seed):
    found = [order.drawn_timesteps((1, 2, 3, 4), seed, step) for step in range(EPOCH)]
    found += [order.drawn_timesteps((2, 4), seed, step) for step in range(EPOCH, 2 * EPOCH)]
    assert found == DRAWN[seed]
    many = [order.drawn_timesteps((1, 2, 4), 7, step) for step in range(3000)]
    assert all(abs(many.count(t) - 1000) < 80 for t in (1, 2, 4))


@pytest.mark.parametrize(("phases", "seed"), [(TO_TET, 7), (FROM_TET, 0)])
def test_a_turning_run_is_a_loop_by_hand(phases, seed, main, tiny_config, tmp_path):
    changes = {"engine": "torch", "precision": "fp64", "phases": phases, "seed": seed}
    changes["loss"] = {"lambda": 0.1, "phi": 2.0, "label_smoothing": 0.1}
    file = tiny_config(changes)
    config, world = load(str(file)), World(0, 1, torch.device("cpu"), None)
    index = load_index(index_file(config.data.index_dir, "train"))
    torch.manual_seed(config.seed)
    model = config.model.build(num_classes=4, timesteps=4).double().train()
    model.set_execution("reference")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=0.01)
    expected = []
    with train_loader(config, index, world, 0) as loader:
        for step, timesteps in enumerate(DRAWN[seed]):
            is_tet = (step < EPOCH) == (phases is FROM_TET)
            model.set_timesteps(timesteps)
            optimizer.zero_grad()
            total = 0.0
            for _ in range(4):
                batch = next(loader)
                logits = model(batch.images.double(), per_timestep=True)
                if is_tet:
                    each = [
                        F.cross_entropy(one, batch.labels, label_smoothing=0.1) for one in logits
                    ]
                    value = 0.9 * sum(each) / timesteps + 0.1 * (logits - 2.0).square().mean()
                else:
                    value = F.cross_entropy(logits.mean(0), batch.labels, label_smoothing=0.1)
                (value / 4).backward()
                total += value.item() / 4
            lr = 0.001 + (0.05 - 0.001) * 0.5 * (1 + math.cos(math.pi * step / (2 * EPOCH)))
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            expected.append((total, lr))
    expect(main(file))
    found = tiny.metrics(tmp_path / "runs/tiny", "train")
    assert [(line["loss"], line["lr"]) for line in found] == [pytest.approx(e) for e in expected]
    weights = load_file(tiny.newest(tmp_path / "runs/tiny") / "model.safetensors")
    for key, value in model.named_parameters():
        torch.testing.assert_close(weights[key], value.detach(), rtol=1e-9, atol=1e-12, msg=key)
    # Evaluations are at the largest T of a phase.
    assert [line["timesteps"] for line in tiny.metrics(tmp_path / "runs/tiny", "val")] == [4, 4]


def test_time_left_counts_image_timesteps(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    # Five steps at T=2, then five at T=4.
    work = {step: 2.0 * step + 2 * max(0, step - 5) for step in range(11)}
    progress = RunProgress(0, 10, 5, 8, work=work.__getitem__, silent=True)
    for _ in range(3):
        now += 2.0
        progress.advance()
    assert progress.seconds_left() == 2 * 2 + 5 * 4
