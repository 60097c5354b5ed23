"""Streams and threads wait for the batches, averages and graphs that they use.

The worker, one of 8 processes, trains two steps, saves each, evaluates, and examines a step, with
real data.
`happens_before.Order` takes down each use of memory. Each fault is made in the code that trains.
"""

import re

import pytest

# Two micro-batches for each of the 8 processes.
BATCHES = {"batch": {"global": 32, "micro": 2, "eval": 7}}
# Batches come from a process, or from a GPU's decoder.
ON_GPU = ("data.device=gpu",)
# As check_gpu's runs.
EDITED = (*ON_GPU, "data.auto_augment=rand-m9-mstd0.5-inc1", "deterministic=true")
GRAPHS = (*ON_GPU, "engine=torch", "cuda_graphs=true")
# The host asks whether its last step was undone.
LAMB = (*ON_GPU, "engine=torch", "phases.0.optimizer={kind: timm:lamb, lr: 0.01}")


@pytest.mark.parametrize(
    "overrides",
    [
        ("data.mixup=0.2", "data.erasing.probability=0.5", "batch_norm.sync=true", "ema.decay=0.9"),
        (*ON_GPU, "engine=torch", "execution=fused", "precision=fp16"),
        EDITED,
        (*GRAPHS, "data.cutmix=1.0"),
        LAMB,
    ],
    ids=" ".join,
)
def test_all_work_waits_for_what_it_uses(overrides, running, tiny_config):
    answer = running.order(tiny_config(BATCHES), *overrides)
    assert answer["error"] is None
    assert answer["unordered"] == []
    assert answer["ungraphed"] == []
    assert answer["refused"] == []
    # Of few kernels, the host also waits for what a larger network's have long done.
    asks = "step.py" if "fp16" in overrides[-1] else "optimizers.py" if overrides is LAMB else "-"
    assert [one for one in answer["waits"] if asks not in one] == []


FINISH = "tetdist.distributed.overlap:OverlappedMean.finish"
NEXT = "tetdist.data.delivery:DeviceBatches.__next__"
FREED = "is freed while aten.convolution_backward at .* on stream 0 may still use it"
SAVE = "tetdist.training.saving:Saving.begin"
COPY = "written by aten.copy_ at tetdist/buffers.py.* read by a file on the checkpoint"
LIVE = "read by a file on the checkpoint and is written by .* on stream 0"

# Each with the function, the line, what is there instead, and what is said of it.
FAULTS = {
    "an average is not waited for": (
        *(FINISH, "work.wait()", "pass"),
        "written by all_reduce at tetdist/distributed/overlap.py",
    ),
    "memory is freed while the GPU trains on it": (
        *(NEXT, "tensor.record_stream(", "(lambda _: None)(", FREED),
    ),
    "a copy is saved before it is complete": (SAVE, "copied.synchronize()", "pass", COPY),
    "a copy is not known to be complete": (SAVE, "copied.record()", "pass", COPY),
    "weights are saved that train on": (SAVE, "copy_to_host(run.model.", "(run.model.", LIVE),
    "an average is saved that goes on": (SAVE, "copy_to_host(average.", "(average.", LIVE),
    "an optimiser's state is saved that goes on": (
        *("tetdist.training.engines.base:WholeEngine.optimizer_state", "copy_to_host(", "(", LIVE),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(name, running, tiny_config):
    *fault, text = FAULTS[name]
    answer = running.order(tiny_config(BATCHES), *ON_GPU, "ema.decay=0.9", fault=fault)
    assert answer["error"] is None
    assert any(re.search(text, one) for one in answer["unordered"]), answer["unordered"]
