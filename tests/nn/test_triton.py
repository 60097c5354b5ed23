"""Triton kernels alone, and how they are chosen. They are interpreted; test_fused.py has them
against the definition."""

import contextlib
import logging

import pytest
import torch
from kernel_runs import draw, interpreted, needs_triton, randomize
from torch._subclasses.fake_tensor import FakeTensorMode

from tetdist.nn import packed
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.fast import dispatch
from tetdist.nn.neurons import LIF

needs_triton()

from tetdist.nn.fast import triton_kernels  # noqa: E402  # needs Triton

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.mark.parametrize("average", [None, lambda moments: moments], ids=["own", "averaged"])
def test_statistics_of_many_rows_do_not_cancel(average):
    x = (1000 + draw(0, 2, 5000, 3)).float()
    norm = BatchNorm(3, scale=0.7).train()
    randomize(norm)
    norm.deferred, norm.average = True, average
    kernels = triton_kernels.NeuronKernels(LIF(), 2, carries=False, packs=False)
    with interpreted(), torch.no_grad():
        gain, offset, mean, rstd = kernels.normalization(norm, x)
    exact_mean = x.double().mean((0, 1))
    exact_var = x.double().var((0, 1), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-7, atol=0)
    exact_rstd = (exact_var + norm.eps).rsqrt()
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=1e-5, atol=0)
    torch.testing.assert_close(gain, 0.7 * norm.weight.detach() * rstd, rtol=2e-7, atol=0)
    torch.testing.assert_close(offset, norm.bias.detach() - gain * mean, rtol=1e-6, atol=0)
    assert norm.pending_count == 1
    assert torch.equal(norm.pending_mean, mean)
    unbiased = (exact_var * 10000 / 9999).float()
    torch.testing.assert_close(norm.pending_var, unbiased, rtol=1e-5, atol=0)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_sums_of_many_programs(number):
    partial, scales = draw(0, 1300, number, 20).float(), draw(1, 2, 20).float()
    rstds = [*scales[: number - 1], None, None][:2]
    with interpreted():
        sums, copy = triton_kernels._added(partial, *rstds)
    expected = partial.double().sum(0)
    for row, rstd in zip(expected[1:], rstds, strict=False):
        row *= rstd
    torch.testing.assert_close(sums, expected.float(), rtol=1e-6, atol=0)
    assert torch.equal(copy, sums)


@pytest.mark.parametrize("count", [1, 31, 32, 200])
def test_bytes_are_halved_and_unpacked_as_by_torch(count):
    """Those of a part of a tensor, which begins anywhere in its memory."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 16, (count + 7,), generator=generator).to(torch.uint8)[7:]
    whole = packed.Packed(values, 4)
    expected = packed.halve(whole)
    with interpreted():
        found = packed.halve(whole)
        assert torch.equal(found.values, expected.values)
        numbers = found.numbers(torch.bfloat16)
        unpacked = whole.unpack(torch.float32)
    assert torch.equal(packed.packed_of(numbers).values, values)
    assert torch.equal(numbers, values.bfloat16() / 4)
    assert torch.equal(unpacked, values / 4)


@pytest.mark.parametrize("index", [0, 1])
def test_a_kernel_runs_on_the_gpu_of_its_tensors(index, monkeypatch):
    chosen, ran_on = [torch.device("cuda", 0)], []

    @contextlib.contextmanager
    def on(device):
        chosen.append(device)
        yield
        chosen.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1].index)
    monkeypatch.setattr(torch.cuda, "device", on)
    kernels = {(3,): lambda x, **_: ran_on.append((x.device, chosen[-1]))}
    with FakeTensorMode():
        triton_kernels.launch(kernels, (3,), [torch.empty(2, device=f"cuda:{index}")], {})
    assert ran_on == [(torch.device("cuda", index),) * 2]
    assert len(chosen) == 1


# -------------------------------------------------------------------------------- what is chosen


@pytest.fixture
def undecided(monkeypatch):
    monkeypatch.setattr(dispatch, "_uses_triton", {})


NONE = dict.fromkeys(dispatch.FAMILIES, "no Triton")


@pytest.mark.usefixtures("undecided")
@pytest.mark.parametrize("gathered", [[NONE], [{}, {"attention": "too old"}, {}], [{}, {}]])
def test_all_processes_use_a_family_or_none_does(gathered, monkeypatch, caplog):
    monkeypatch.setattr(
        dispatch, "_reason_against_triton", lambda family, _: gathered[0].get(family)
    )
    own = []

    def gather(reasons):
        own.append(reasons)
        return gathered

    with caplog.at_level(logging.WARNING):
        dispatch.decide(torch.device("cuda"), gather)
    assert own == [gathered[0]]
    missing = set().union(*gathered)
    assert dispatch._uses_triton == {family: family not in missing for family in dispatch.FAMILIES}
    assert len(caplog.records) == bool(missing)  # one line, whatever the number of families
    for family in missing:
        assert dispatch.FAMILIES[family] in caplog.text
    assert ("1 of 3 processes (too old)" in caplog.text) == (len(gathered) == 3)


@pytest.mark.usefixtures("undecided")
def test_where_triton_does_not_work_the_reason_is_reported_once(caplog, monkeypatch):
    # This device cannot compute, and no driver is called.
    for name in ("arange", "zeros"):
        monkeypatch.setattr(torch, name, lambda *_, **__: 1 / 0)
    with caplog.at_level(logging.WARNING):
        dispatch.decide(torch.device("cuda"))
    assert not any(dispatch._uses_triton.values())
    (message,) = caplog.messages
    assert "division by zero" in message
    assert "apt-get install gcc" in message


def test_an_old_triton_serves_the_families_that_it_compiles(monkeypatch):
    monkeypatch.setattr(triton_kernels.triton, "__version__", "3.3.1")
    with interpreted():
        for family in dispatch.FAMILIES:
            reason = dispatch._reason_against_triton(family, CPU)
            assert reason == ("Triton 3.3.1 is older than 3.4" if family == "attention" else None)


@pytest.mark.parametrize(
    ("family", "kernel", "argument"),
    [("neurons", "unpack", 1), ("pooling", "forward", 1), ("attention", "attend", 5)],
)
def test_a_kernel_that_computes_wrongly_is_not_used(family, kernel, argument, monkeypatch):
    launch = triton_kernels.launch

    def wrong(which, grid, arguments, known):
        launch(which, grid, arguments, known)
        assert which.fn.__name__ == kernel
        arguments[argument].flatten()[-1] += 1

    with interpreted():
        assert dispatch._reason_against_triton(family, CPU) is None
        monkeypatch.setattr(triton_kernels, "launch", wrong)
        assert dispatch._reason_against_triton(family, CPU) == "a kernel returns wrong results"


@pytest.mark.usefixtures("undecided")
def test_a_cpu_needs_no_decision():
    dispatch.decide(torch.device("cpu"), lambda _: pytest.fail("a CPU has nothing to agree about"))
    assert dispatch._uses_triton == {}
