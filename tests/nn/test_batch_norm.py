"""Batch norm over micro-batch x time: equal to torch's, with running statistics updated once a
step."""

import copy
import inspect
import threading

import pytest
import timm
import torch
from torch import nn

from tetdist.errors import UserError
from tetdist.nn.batch_norm import (
    BatchNorm,
    defer_running_statistics,
    recomputing,
    update_running_statistics,
)


def _currents(num, channels=3, seed=0, dtype=torch.float64):
    """Currents (T, B, C, H, W) whose channels differ in mean and spread."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.5, 3, channels, dtype=torch.float64).view(-1, 1, 1)
    shape = (2, 3, channels, 4, 5)
    return [
        (torch.randn(shape, generator=generator, dtype=torch.float64) * spread + spread + i).to(
            dtype
        )
        for i in range(num)
    ]


def _itself(flat):
    """Mean over the processes, with only one process."""
    return flat


def _moved(norm, batches):
    """Running mean and variance after one update with the average over ``batches``."""
    flat = [batch.transpose(0, 2).flatten(1) for batch in batches]
    mean = torch.stack([values.mean(1) for values in flat]).mean(0)
    var = torch.stack([values.var(1, correction=1) for values in flat]).mean(0)
    keep, take = 1 - norm.momentum, norm.momentum
    return keep * norm.running_mean + take * mean, keep * norm.running_var + take * var


def _statistics(norm):
    return norm.running_mean.clone(), norm.running_var.clone()


def _pending_is_empty(norm):
    return norm.pending_count == 0 and not norm.pending_mean.any() and not norm.pending_var.any()


# ------------------------------------------------------------------------------- against torch's


@pytest.mark.parametrize(("eps", "momentum"), [(1e-5, 0.1), (1e-2, 0.3)])
def test_equals_torch_over_flattened_time(eps, momentum):
    ours = BatchNorm(3, eps=eps, momentum=momentum).double()
    theirs = nn.BatchNorm2d(3, eps=eps, momentum=momentum).double()
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(torch.tensor([0.5, -1.0, 2.0]))
            norm.bias.copy_(torch.tensor([0.0, 0.25, -1.0]))
    weight = torch.randn(2, 3, 3, 4, 5, generator=torch.Generator().manual_seed(9)).double()
    for current in _currents(3):
        mine = current.clone().requires_grad_()
        flat = current.flatten(0, 1).requires_grad_()
        y, y_torch = ours(mine), theirs(flat).unflatten(0, (2, 3))
        torch.testing.assert_close(y, y_torch)
        for norm, output in ((ours, y), (theirs, y_torch)):
            norm.zero_grad()
            (output * weight).sum().backward()
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, flat.grad.unflatten(0, (2, 3)))
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
        torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.eval()
    theirs.eval()
    (current,) = _currents(1, seed=5)
    before = _statistics(ours)
    torch.testing.assert_close(ours(current), theirs(current.flatten(0, 1)).unflatten(0, (2, 3)))
    assert all(map(torch.equal, _statistics(ours), before))  # evaluation records nothing
    assert _pending_is_empty(ours)


@pytest.mark.parametrize("deferred", [False, True], ids=["immediate", "deferred"])
def test_copies_count_as_if_they_were_there(deferred):
    norm = _deferred() if deferred else BatchNorm(3).double()
    spread_out = copy.deepcopy(norm)
    for image in (batch[:1] for batch in _currents(2)):
        y = norm(image, copies=4)
        torch.testing.assert_close(y, spread_out(image.expand(4, *image.shape[1:]))[:1])
    for one in (norm, spread_out):
        update_running_statistics(one, _itself)
    torch.testing.assert_close(_statistics(norm), _statistics(spread_out), rtol=1e-12, atol=0)


def test_bfloat16_current_is_normalised_in_float32():
    (current,) = _currents(1, dtype=torch.bfloat16)
    norm = BatchNorm(3)
    y = norm(current)
    assert y.dtype == torch.bfloat16
    assert norm.running_var.dtype == torch.float32
    wide = BatchNorm(3)
    expected = wide(current.float())
    assert torch.equal(y, expected.to(torch.bfloat16))
    assert torch.equal(norm.running_mean, wide.running_mean)


def test_a_mean_far_from_0_does_not_drown_the_variance():
    current = 1000 + torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = BatchNorm(1).double()(current.double())
    assert (BatchNorm(1)(current) - exact).abs().max() < 1e-3


# -------------------------------------------------------------------------------- deferred moves


def _deferred(channels=3):
    norm = BatchNorm(channels).double()
    defer_running_statistics(norm)
    return norm


@pytest.mark.parametrize("num_batches", [1, 2, 5])
def test_one_update_moves_by_the_average_over_micro_batches(num_batches):
    norm = _deferred()
    for step in range(2):
        batches = _currents(num_batches, seed=step)
        before = _statistics(norm)
        expected = _moved(norm, batches)
        for batch in batches:
            norm(batch)
            assert all(map(torch.equal, _statistics(norm), before))
        update_running_statistics(norm, _itself)
        torch.testing.assert_close(_statistics(norm), expected)
        assert _pending_is_empty(norm)


def test_a_norm_that_was_not_used_stays_and_the_others_get_their_own_statistics():
    norms = [BatchNorm(3), BatchNorm(5), BatchNorm(2), BatchNorm(4, momentum=0.3)]
    model = nn.ModuleList(norms).double()
    defer_running_statistics(model)
    first, unused, third, slower = norms
    batches = {first: _currents(2, 3, seed=1), third: _currents(1, 2, seed=2)}
    batches |= {slower: _currents(1, 4, seed=3)}
    expected = {norm: _moved(norm, batch) for norm, batch in batches.items()}
    for norm, used in batches.items():
        for batch in used:
            norm(batch)
    calls = []

    def average(flat):
        calls.append(len(flat))
        return flat

    update_running_statistics(model, average)
    assert calls == [2 * (3 + 2), 2 * 4]  # one collective call for all of the same momentum
    for norm, moved in expected.items():
        torch.testing.assert_close(_statistics(norm), moved)
    assert unused.running_mean.tolist() == [0] * 5
    assert unused.running_var.tolist() == [1] * 5


# ----------------------------------------------------------------------- steps that are given up


@pytest.mark.parametrize("discards", [False, True], ids=["given up", "discarded"])
@pytest.mark.parametrize("bad", [1.0, float("nan"), float("inf")])
def test_a_step_that_is_given_up_leaves_no_trace(bad, discards):
    norm = _deferred()
    poisoned, clean = _currents(2)
    poisoned[0, 0, 1, 0, 0] = bad
    before = _statistics(norm)
    norm(poisoned)
    if discards:
        norm.discard()
    else:
        update_running_statistics(norm, _itself, apply=torch.tensor(False))
    assert all(map(torch.equal, _statistics(norm), before))
    assert _pending_is_empty(norm)
    expected = _moved(norm, [clean])
    norm(clean)
    update_running_statistics(norm, _itself, apply=torch.tensor(True))
    torch.testing.assert_close(_statistics(norm), expected)


# ----------------------------------------------------------------------------------- repetitions


@pytest.mark.parametrize("deferred", [False, True], ids=["immediate", "deferred"])
def test_a_repeated_forward_pass_is_not_counted(deferred):
    norm = _deferred() if deferred else BatchNorm(3).double()
    (batch,) = _currents(1)
    expected = _moved(norm, [batch])
    y = norm(batch)
    with recomputing():
        assert torch.equal(norm(batch), y)
        norm(2 * batch)
    update_running_statistics(norm, _itself)
    torch.testing.assert_close(_statistics(norm), expected)


@pytest.mark.parametrize(
    "convert",
    [
        nn.SyncBatchNorm.convert_sync_batchnorm,
        timm.layers.convert_sync_batchnorm,
        timm.layers.convert_splitbn_model,
        timm.utils.freeze,
        timm.layers.freeze_batch_norm_2d,
    ],
)
def test_conversions_that_would_change_nothing_are_refused(convert):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), BatchNorm(3))
    with pytest.raises(UserError, match=r"batch_norm.sync=true.* include_bn_running_stats=False"):
        convert(model)
    assert not hasattr(model[1], "num_features")
    assert ("num_channels", 3) in inspect.getmembers(model[1])
    timm.utils.freeze(model, include_bn_running_stats=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    buffers = ["running_mean", "running_var"]
    assert list(model[1].state_dict()) == ["weight", "bias", *buffers]
    model[1].load_state_dict(dict(model[1].state_dict()))  # no version, as of a file


def test_a_repetition_in_one_thread_does_not_silence_another():
    # autograd repeats forward passes in its own threads on a GPU.
    norm = _deferred()
    (batch,) = _currents(1)
    with recomputing():
        other = threading.Thread(target=norm, args=(batch,))
        other.start()
        other.join()
        assert norm.pending_count == 1
        norm(batch)
    assert norm.pending_count == 1
