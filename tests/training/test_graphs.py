"""A run with CUDA graphs is the run without them, to the bit: what a CPU can show of it.

graph_stand_ins.py has what stands in for the graph. tests/gpu_without_a_gpu/ looks at what a GPU's
capture asks of a micro-batch.
"""

import contextlib

import pytest
import tiny
import torch
from graph_stand_ins import run_again, taped
from tiny import expect
from torch import nn

from tetdist.errors import UserError
from tetdist.nn.batch_norm import RunningMean
from tetdist.training import feed, graphs, prepared
from tetdist.training.engines import base


@pytest.fixture
def both(main, tiny_config, tmp_path, monkeypatch):
    """Trains with and without graphs: (changes, what stands in); the folders of the runs."""
    monkeypatch.setattr(prepared, "check_gpu", lambda *_: None)
    captures = 0

    def run(changes, capture, *, captured=1):
        def counting(function, *_):
            nonlocal captures
            captures += 1
            return capture(function)

        monkeypatch.setattr(graphs, "capture", counting)
        for name, with_graphs in (("plain", False), ("graphs", True)):
            file = tiny_config({"phases.0.epochs": 1, "name": name, "engine": "torch"} | changes)
            text = expect(main(file, f"cuda_graphs={str(with_graphs).lower()}"))
            assert ("check_gpu" in text) == with_graphs
        assert captures == captured
        return tmp_path / "runs/plain", tmp_path / "runs/graphs"

    return run


CASES = {
    "clipped, smoothed, distilled from itself, mixed": {
        "gradient_clipping": 0.5,
        "phases.0.optimizer": {"kind": "adamw", "lr": 0.01, "weight_decay": 0.1},
        "loss": {"label_smoothing": 0.1, "distillation": {"self_weight": 0.3}},
        "data.mixup": 0.2,
        "data.cutmix": 1.0,
        # Targets are shares of the classes whether or not a micro-batch is mixed: one graph.
        "data.mixing": {"mode": "batch", "probability": 0.5, "off_epoch": 1},
        "phases.0.epochs": 2,
        "max_steps": 7,
    },
    "bf16, blocks, one micro-batch": {
        "precision": "bf16",
        "recompute": "blocks",
        "batch": {"global": 8, "micro": 8, "eval": 7},
    },
    "segments, T drawn, an optimiser that the host asks first": {
        "recompute": {"timesteps": 1},
        "phases.0.timesteps": [2, 3],
        "phases.0.optimizer": {"kind": "timm:lamb", "lr": 0.01},
    },
    "other features dropped in each step": {"model.arguments.drop_rate": 0.3},
}


@pytest.mark.parametrize("case", [*CASES, "fused"])
def test_a_run_is_the_same_with_graphs(case, both):
    is_fused = case == "fused"
    changes = CASES.get(case, {}) | {"execution": "fused" if is_fused else "reference"}
    captured = 2 if "T drawn" in case else 1
    tiny.assert_same_run(*both(changes, run_again if is_fused else taped, captured=captured))


def test_steps_that_are_not_finite_change_nothing(both, monkeypatch):
    """They leave nothing in the gradients that a graph adds to."""
    prepared, calls = feed.Feed.prepared, 0

    def spoilt(self, batch):
        nonlocal calls
        images, targets = prepared(self, batch)
        calls += 1
        # A micro-batch of the first step and one of the third, of twenty in each run.
        return (images * float("nan") if calls % 20 in (2, 11) else images), targets

    monkeypatch.setattr(feed.Feed, "prepared", spoilt)
    plain, with_graphs = both({}, taped)
    assert [one["non_finite_steps"] for one in tiny.metrics(plain, "train")][:4] == [1, 0, 1, 0]
    tiny.assert_same_run(plain, with_graphs)


def test_the_scale_of_a_float16_loss_is_read_anew(both, monkeypatch):
    """It is halved while the graph is there, and doubled again."""
    monkeypatch.setattr(base.LossScale, "START", 2.0**30)
    monkeypatch.setattr(base.LossScale, "GROWTH_INTERVAL", 3)
    plain, with_graphs = both({"precision": "fp16"}, taped)
    lines = tiny.metrics(plain, "train")
    assert len({line["loss_scale"] for line in lines}) > 1
    assert lines[-1]["overflows"] > 2
    tiny.assert_same_run(plain, with_graphs)


class OneLayer(nn.Linear):
    timesteps = 1


def test_a_capture_within_a_step_keeps_its_gradients_and_records(monkeypatch):
    monkeypatch.setattr(graphs, "capture", taped)
    layer = OneLayer(3, 1, bias=False)
    layer.running = RunningMean(torch.zeros(()))
    layer.running.deferred = True

    def add_gradients(images):
        loss = layer(images).sum()
        loss.backward()
        layer.running(loss)
        return loss.detach()

    graphed = graphs.Graphed(add_gradients, layer)
    calls = ((1, 2), (2, 4), (1, 2))
    losses = [float(graphed(torch.ones(n, 3))) for layer.timesteps, n in calls]
    assert layer.weight.grad.tolist() == [[8.0] * 3]
    assert layer.running.pending_count == 3
    assert layer.running.pending.item() == pytest.approx(sum(losses))


def test_a_capture_begins_warm_and_names_what_it_cannot_take(monkeypatch):
    """The first error is reported: ending such a capture fails as well."""
    asked = {}

    class Stream:
        def wait_stream(self, _other): ...

    @contextlib.contextmanager
    def graph(*_, **options):
        asked.update(options)
        try:
            yield
        finally:
            raise RuntimeError("the capture was invalidated")

    stand_ins = {"CUDAGraph": object, "Stream": Stream, "current_stream": Stream, "graph": graph}
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
    calls = 0

    def asking():
        nonlocal calls
        calls += 1
        if asked:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        return torch.zeros(())

    with pytest.raises(UserError) as caught:
        graphs.capture(asking, object, Stream)
    assert str(caught.value) == (
        "cuda_graphs: a micro-batch cannot be captured (operation not permitted when stream is "
        "capturing); set cuda_graphs=false"
    )
    # As often as torch's documentation asks for; other threads go on using the GPU meanwhile.
    assert calls == 3 + 1
    assert asked["capture_error_mode"] == "thread_local"
    assert isinstance(asked["stream"], Stream)
