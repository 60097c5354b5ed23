"""Gradients averaged in the backward pass are those averaged after it, to the bit."""

import json
import textwrap
from pathlib import Path

import pytest
import tiny
import torch
from tiny import Farm
from torch import nn

from tetdist.distributed import overlap
from tetdist.distributed.world import join

CODE = """
    import dataclasses, json, sys
    import torch, timm
    import torch.distributed as dist
    import tetdist.models
    from tetdist.config import loading
    from tetdist.distributed import overlap
    from tetdist.distributed.world import join
    from tetdist.losses import tet_loss
    from tetdist.optimizers import make_optimizer
    from tetdist.training.engines.base import GradientMean

    overlap.BUCKET_BYTES = 2000

    def averaged(world, recompute, overlapped, unused=False):
        values = json.loads(sys.argv[1]) | {"recompute": recompute}
        config = loading.parse(values, "x")
        torch.manual_seed(0)
        model = timm.create_model("sew_resnet18", num_classes=4, timesteps=2)
        model.set_grad_checkpointing(recompute != "none")
        if recompute not in ("none", "blocks"):
            model.set_segment(1)
        if unused:
            model.fc.bias.requires_grad_(True)
            model.register_parameter("stray", torch.nn.Parameter(torch.ones(3)))
        optimizer = make_optimizer(model, config.phases[0].optimizer)
        mean = GradientMean(config, optimizer, world, accumulation=2)
        if not overlapped:
            mean._overlaps = False
        early = []
        for step in range(2 if recompute == "none" else 1):
            optimizer.zero_grad()
            for k in range(2):
                generator = torch.Generator().manual_seed(10 * step + 4 * k + world.rank)
                images = torch.rand(2, 3, 33, 33, generator=generator)
                logits = model(images, per_timestep=True)
                loss = tet_loss(logits, torch.tensor([0, 1]), lambda_=0.001)
                with mean.backward_pass():
                    loss.backward()
                early.append(len(mean._overlapped._under_way))
            mean.average()
        mean.close()
        return [p.grad for p in model.parameters() if p.grad is not None], early

    with join("cpu") as joined:
        world = dataclasses.replace(joined, shared=None)
        for recompute in ("none", "blocks"):
            after, at_the_end = averaged(world, recompute, False)
            assert set(at_the_end) == {0}
            during, early = averaged(world, recompute, True)
            assert all(map(torch.equal, after, during)), recompute
            # None before a step's last micro-batch, and then all of them in the backward pass.
            assert early[::2] == [0] * (len(early) // 2), early
            assert min(early[1::2]) > 10, early
        # Over segments a gradient comes in parts.
        assert set(averaged(world, {"timesteps": 1}, True)[1]) == {0}
        after, _ = averaged(world, "none", False, unused=True)
        during, _ = averaged(world, "none", True, unused=True)
        assert all(map(torch.equal, after, during))
        print("all equal")
"""


def test_gradients_behind_one_that_never_comes_are_averaged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A lone process sums its own gradients; the mean of two processes is half of that."""
    monkeypatch.setattr(overlap, "BUCKET_BYTES", 1)  # a bucket for each parameter
    first, stray, last = (nn.Parameter(torch.ones(2)) for _ in range(3))
    with join("cpu"):
        mean = overlap.OverlappedMean([first, stray, last], world_size=2)
        mean.active = True
        (first * last).sum().backward()
        assert len(mean._under_way) == 1
        mean.finish()
        mean.close()
    assert [p.grad if p.grad is None else p.grad.tolist() for p in (first, stray, last)] == [
        [0.5, 0.5],
        None,
        [0.5, 0.5],
    ]


# Of two processes' numbers a sum is the same in any order; of three it is not.
@pytest.mark.long
def test_averages_of_a_backward_pass_are_those_after_it(farm: Farm, tmp_path: Path) -> None:
    model = {"name": "sew_resnet18", "arguments": {}}
    values = tiny.changed(tiny.CONFIG, {"name": "x", "data.root": "d", "model": model})
    command = tiny.python("-c", textwrap.dedent(CODE), json.dumps(values))
    for status, output in farm.side_by_side(3, command, tmp_path):
        assert status == 0, output
        assert "all equal" in output
