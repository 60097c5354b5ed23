"""Gradients averaged in the backward pass are those averaged after it, to the bit."""

import json
import textwrap
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from tetdist.distributed import overlap
from tetdist.distributed.world import join

HERE = Path(__file__).parent
CODE = """
    import json, sys
    import torch, timm
    import torch.distributed as dist
    import tetdist.models
    sys.path.append(sys.argv.pop())
    from faults import faulty
    from tetdist.config import loading
    from tetdist.distributed import overlap
    from tetdist.distributed.world import join
    from tetdist.losses import tet_loss
    from tetdist.optimizers import make_optimizer
    from tetdist.training.engines.base import GradientMean

    overlap.BUCKET_BYTES = 2000
    VALUES, FAULTS = map(json.loads, sys.argv[1:])

    def made(recompute):
        torch.manual_seed(0)
        model = timm.create_model("sew_resnet18", num_classes=4, timesteps=2, width=8)
        model.set_grad_checkpointing(recompute != "none")
        if recompute not in ("none", "blocks"):
            model.set_segment(1)
        return model

    def loss_of(model, step, k, rank):
        generator = torch.Generator().manual_seed(10 * step + 4 * k + rank)
        images = torch.rand(2, 3, 33, 33, generator=generator)
        logits = model(images, per_timestep=True)
        return tet_loss(logits, torch.tensor([0, 1]), lambda_=0.001)

    def gradients(model):
        return [p.grad for p in model.parameters() if p.grad is not None]

    def averaged(world, recompute, overlapped, unused=False, steps=2):
        config = loading.parse(VALUES | {"recompute": recompute}, "x")
        model = made(recompute)
        if unused:
            model.fc.bias.requires_grad_(True)
            model.register_parameter("stray", torch.nn.Parameter(torch.ones(3)))
        optimizer = make_optimizer(model, config.phases[0].optimizer)
        mean = GradientMean(config, optimizer, world, accumulation=2)
        if not overlapped:
            mean._overlaps = False
        early = []
        for step in range(steps):
            optimizer.zero_grad()
            for k in range(2):
                loss = loss_of(model, step, k, world.rank)
                with mean.backward_pass():
                    loss.backward()
                early.append(len(mean._overlapped._under_way))
            mean.average()
        mean.close()
        return gradients(model), early

    def by_hand(world_size):
        sums = None
        for rank in range(world_size):
            model = made("none")
            for k in range(2):
                loss_of(model, 0, k, rank).backward()
            mine = gradients(model)
            sums = mine if sums is None else list(map(torch.add, sums, mine))
        return [one / world_size for one in sums]

    def compare_with_faults(world):
        expected = by_hand(2)
        def is_right(overlapped):
            return all(map(torch.equal, expected, averaged(world, "none", overlapped, steps=1)[0]))
        found = {"none": is_right(True), "after the backward pass": is_right(False)}
        for name, fault in FAULTS.items():
            with faulty(*fault):
                found[name] = is_right(True)
        print(json.dumps(found))

    def compare_ways(world):
        for recompute in ("none", "blocks"):
            steps = 2 if recompute == "none" else 1
            after, at_the_end = averaged(world, recompute, False, steps=steps)
            assert set(at_the_end) == {0}
            during, early = averaged(world, recompute, True, steps=steps)
            assert all(map(torch.equal, after, during)), recompute
            # None before a step's last micro-batch, and then all of them in the backward pass.
            assert early[::2] == [0] * (len(early) // 2), early
            assert min(early[1::2]) > 10, early
        # Over segments a gradient comes in parts.
        assert set(averaged(world, {"timesteps": 1}, True, steps=1)[1]) == {0}
        after, _ = averaged(world, "none", False, unused=True)
        during, _ = averaged(world, "none", True, unused=True)
        assert all(map(torch.equal, after, during))
        print("all equal")

    with join("cpu") as world:
        compare_with_faults(world) if FAULTS else compare_ways(world)
"""


def compare(farm, processes, folder, faults):
    """Run CODE on several processes; what each prints."""
    model = {"name": "sew_resnet18", "arguments": {}}
    values = tiny.changed(tiny.CONFIG, {"name": "x", "data.root": "d", "model": model})
    arguments = map(json.dumps, (values, faults))
    command = tiny.python("-c", textwrap.dedent(CODE), *arguments, HERE.parent)
    for status, output in farm.side_by_side(processes, command, folder):
        assert status == 0, output
        yield output


def test_gradients_behind_one_that_never_comes_are_averaged(monkeypatch):
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


OVERLAPPED = "tetdist.distributed.overlap:OverlappedMean"
FAULTS = {
    "averages are dropped": (
        "tetdist.training.engines.base:GradientMean.average",
        "self._overlapped.finish()",
        "pass",
    ),
    "sums are dropped": (f"{OVERLAPPED}.finish", "torch._foreach_copy_(grads, parts)", "pass"),
    "nothing is summed": (f"{OVERLAPPED}._begin", "dist.all_reduce(flat, async_op=True)", "None"),
    "sums are not divided": (f"{OVERLAPPED}.finish", "flat.div_(self._world_size)", "pass"),
    "earlier micro-batches are left out": (
        f"{OVERLAPPED}._begin",
        "join(bucket, self.earlier)",
        "pass",
    ),
}


def test_averages_are_the_sums_by_hand(farm, tmp_path):
    """With faults made in the code they are not. Of two numbers a sum is the same in any order."""
    for output in compare(farm, 2, tmp_path, FAULTS):
        found = json.loads(output.splitlines()[-1])
        assert found == {"none": True, "after the backward pass": True} | dict.fromkeys(
            FAULTS, False
        )


# Of three processes' numbers it is not.
@pytest.mark.long
def test_averages_of_a_backward_pass_are_those_after_it(farm, tmp_path):
    for output in compare(farm, 3, tmp_path, {}):
        assert "all equal" in output
