"""Gradients averaged in the backward pass are the averages, each of all micro-batches."""

import pytest
import tiny
import torch
from torch import nn

from tetdist.config.loading import parse
from tetdist.distributed import overlap
from tetdist.distributed.world import World
from tetdist.training.engines.base import GradientMean


class Network(nn.Module):
    """Parameters of two types; the loss does not depend on one of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.stray = nn.Parameter(torch.randn(4)), nn.Parameter(torch.ones(3))
        self.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.later, self.last = (nn.Parameter(torch.randn(4)) for _ in range(2))

    def loss(self, micro_batch):
        products = self.first * self.later * self.last
        return micro_batch * (products.square().sum() + self.wide.square().sum())


@pytest.fixture
def sent(monkeypatch):
    """Number and type of what is summed with another process, whose gradients are three times ours.

    A sum is there when it has been waited for.
    """
    found = []

    class Work:
        def __init__(self, flat):
            self.flat = flat

        def wait(self):
            self.flat.mul_(4)

    def reduce(flat, *, async_op):
        assert async_op
        found.append((flat.numel(), flat.dtype))
        return Work(flat)

    monkeypatch.setattr(overlap.dist, "all_reduce", reduce)
    return found


@pytest.mark.parametrize(
    ("bucket_bytes", "changes", "buckets", "early"),
    [
        # A bucket waits for those before it, and that of the stray parameter is never full.
        (1, {}, [4, 4, 3, 0, 4], 3),
        (25 * 2**20, {"recompute": "blocks"}, [8, 3, 4], 2),
        # Over segments a gradient comes in parts, and from a CUDA graph it comes unseen.
        (1, {"recompute": {"timesteps": 1}}, [4, 4, 3, 0, 4], 0),
        (1, {"cuda_graphs": True, "engine": "torch"}, [4, 4, 3, 0, 4], 0),
    ],
)
def test_averages_are_those_of_all_micro_batches(
    bucket_bytes, changes, buckets, early, sent, monkeypatch
):
    """Buckets have one type; none is sent before the last micro-batch's backward pass."""
    monkeypatch.setattr(overlap, "BUCKET_BYTES", bucket_bytes)
    network = Network()
    optimizer = torch.optim.SGD(network.parameters())
    config = parse(tiny.changed(tiny.CONFIG, {"name": "x", "data.root": "d"} | changes), "x")
    mean = GradientMean(config, optimizer, World(0, 2, torch.device("cpu"), None), accumulation=2)
    for step in (1, 2):
        optimizer.zero_grad()
        under_way = []
        for micro_batch in (step, 10 * step):
            with mean.backward_pass():
                network.loss(micro_batch).backward()
            under_way.append(len(mean._overlapped._under_way))
        assert under_way == [0, early]
        averages = mean.average()
        parameters = [one for one in network.parameters() if one is not network.stray]
        expected = torch.autograd.grad(network.loss(11 * step), parameters)
        assert network.stray.grad is None
        for one, average, grad in zip(parameters, averages, expected, strict=True):
            assert average is one.grad
            torch.testing.assert_close(average, 2 * grad)
        sums = [(number, torch.float64 if number == 3 else torch.float32) for number in buckets]
        assert sent == [one for one in sums if one[0]]
        sent.clear()
    mean.close()
