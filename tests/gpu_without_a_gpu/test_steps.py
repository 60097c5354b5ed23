"""Whole training steps and evaluation batches on a GPU that is not there.

A process of its own (run_steps.py) takes them on tensors without numbers, through the trainer's and
the engines' own code. So these tests find tensors on the wrong device, what has the host wait for
the device, and kernels that are launched without need; they are blind to numbers and to time.
"""

import json
import re
import types
from pathlib import Path

import pytest
import timm
import torch
from worker import launches

from tetdist import models
from tetdist.apps.check_gpu.steps import CASES
from tetdist.config import loading
from tetdist.errors import UserError
from tetdist.nn.batch_norm import BatchNorm
from tetdist.training import memory

RECOMPUTE = {
    "blocks": "recompute=blocks",
    "segments": "recompute={timesteps: 2}",
}
DOCS = Path(__file__).parents[2] / "docs"
ENGINES = {
    "torch": ("engine=torch",),
    "deepspeed": ("engine=deepspeed",),
    "zero2": ("engine=deepspeed", "zero_stage=2"),
}
GRAPHS = (*ENGINES["torch"], "cuda_graphs=true")
EVERYTHING = (
    "data.mixup=0.2",
    "data.cutmix=1.0",
    "data.mixing.mode=batch",
    "batch_norm.sync=true",
    "gradient_clipping=1.0",
    "loss.distillation.teacher=timm:resnet18",
    "loss.distillation.self_weight=0.1",
    "loss.operations=0.1",
    "ema.decay=0.999",
    "model.freeze=[stem]",
)


# The two published objectives; with the shares of mixed samples they are not defined.
OBJECTIVES = {
    "full-range": ("self_target=correct_mean",),
    "SeAl": ("teacher_alignment=error_aware", "self_target=similarity"),
}


@pytest.fixture(scope="session")
def ask(running):
    """Asks the worker, once of each case."""
    answers = {}

    def ask(*case, **about):
        key = json.dumps([case, about])
        answers[key] = answers.get(key) or running.run(*case, **about)
        return dict(answers[key])

    return ask


# What must not be done in a step, and what is said of it; x is on the device.
MISTAKES = {
    "torch.ones(3).to(x.device)": "a pageable copy of float32 (3,) to the device",
    "torch.ones(5).pin_memory().to(x.device)": "a blocking copy of float32 (5,) to the device",
    "x.new_ones(7).cpu()": "a copy of float32 (7,) to the host",
    "torch.where(x > 0, x, torch.tensor(1.0))": "a copy of a number of the host",
    "float(x)": "a number fetched",
    "x.new_ones(8).tolist()": "numbers fetched",
    "torch.cuda.synchronize()": "torch.cuda.synchronize()",
    "(event := torch.cuda.Event()).record() or event.synchronize()": "Event.synchronize()",
    "x.new_ones(9).cumsum(0)": "aten.cumsum",
    "torch.conv2d(x.new_ones(1, 2, 2, 3), x.new_ones(2, 2, 2, 2))": "weight (2, 2, 2, 2)",
}
GRAPH_MISTAKES = {
    "torch.ones(3).pin_memory()": "pinned memory at",
    "torch.ones(3).to(x.device)": "a copy to the device",
    "torch.ones(3) + 1": "aten.add.Tensor, computed on the host",
    "torch.manual_seed(0)": "a seed at",
}


@pytest.mark.parametrize("graphs", [False, True])
def test_mistakes_are_found(graphs, ask):
    mistakes = GRAPH_MISTAKES if graphs else MISTAKES
    lines = f"x = loss.float(); [{', '.join(mistakes)}]; predicted = l"
    answer = ask(
        "spiking_convnet",
        *(GRAPHS if graphs else ENGINES["torch"]),
        fault=("tetdist.training.step:sums_of", "predicted = l", lines),
    )
    assert answer["error"] is None
    found = answer["ungraphed"] or [*answer["waits"], *answer["refused"], *answer["layouts"]]
    assert [text for text in mistakes.values() if text not in str(found)] == []


def assert_runs(answer):
    """It ran, waited for nothing, and would run in the same way twice."""
    assert answer["error"] is None
    assert answer["waits"] == []
    assert answer["refused"] == []
    assert answer["layouts"] == []
    assert answer["ungraphed"] == []


def assert_fp16_runs(answer):
    """It ran as above, but in float16 the host has to know whether the gradient overflowed."""
    (wait,) = set(answer.pop("waits"))
    assert wait.startswith("a number fetched at tetdist/training/step.py")
    assert_runs(answer | {"waits": []})


def assert_zero_runs(answer):
    """It ran as above, but at ZeRO's stages DeepSpeed itself asks the device whether the norm is
    finite, and weights, which are parts of its flat buffers, are not channels_last."""
    waits, layouts = answer.pop("waits"), answer.pop("layouts")
    assert [wait for wait in waits if " at deepspeed/" not in wait] == []
    assert len(set(waits)) <= 2, waits
    others = [text for text in layouts if not text.startswith("convolution: ")]
    assert_runs(answer | {"waits": [], "layouts": others})


CHECKS = {"bf16": assert_runs, "fp16": assert_fp16_runs}


# Of a micro-batch of sew_resnet34, T = 4, bf16; and of the end of a step.
FORWARD_AND_BACKWARD, UPDATE_AND_STATISTICS = 600, 60


def test_launches(ask):
    answer = ask("sew_resnet34", *ENGINES["torch"], micro_batches=1)
    assert_runs(answer)
    assert launches(answer, "forward", "loss", "backward") <= FORWARD_AND_BACKWARD
    assert launches(answer, "update", "statistics") <= UPDATE_AND_STATISTICS
    # What the batch and the sums for the metrics need.
    assert launches(answer, "input") <= 20


def test_a_timed_step_launches_what_a_training_step_does(ask):
    """That of `bench step` and of check_gpu's rates, whose time becomes a run's hours."""
    sizes = {"timesteps": 4, "batch": 32, "size": 224, "precision": "bf16"}
    options = {"model": "sew_resnet34", "modes": ["none"], "device": "cuda", **sizes}
    timed = ask("sew_resnet34", timed=options, steps=2)
    trained = ask("sew_resnet34", *ENGINES["torch"], processes=1, steps=2)
    assert_runs(timed)
    phases = ("forward", "loss", "backward", "update", "statistics")
    assert launches(timed, *phases) > 400
    assert [timed["launches"].get(one) for one in phases] == [
        trained["launches"].get(one) for one in phases
    ]


def test_synchronised_batch_norm_takes_at_most_three_more_launches_a_norm(ask):
    """Forward, the average and what is computed from it; backward, the average of the sums."""
    together, alone = (
        ask("spiking_convnet", *ENGINES["torch"], f"batch_norm.sync={on}")
        for on in ("true", "false")
    )
    assert_runs(together)
    model = timm.create_model("spiking_convnet")
    norms = sum(isinstance(module, BatchNorm) for module in model.modules())
    steps = (launches(one, "forward", "loss", "backward") for one in (together, alone))
    assert 2 * norms < next(steps) - next(steps) <= 3 * norms


def test_events_of_collectives_are_not_kept_until_the_line_of_metrics(ask):
    answer = ask("spiking_convnet", *ENGINES["torch"], "batch_norm.sync=true", steps=20)
    assert_runs(answer)
    kept, made = answer["events"]
    assert 0 < kept < made / 5


def test_a_lack_of_memory_is_explained_by_computed_figures(ask):
    fault = (
        "tetdist.training.step:Step._add_micro_batch",
        "logits = self.engine.forward(images)",
        "raise torch.OutOfMemoryError('CUDA out of memory')",
    )
    answer = ask("sew_resnet34", *ENGINES["torch"], "batch.micro=32", fault=fault)
    assert "UserError: the GPU's memory is too small" in answer["error"]
    figures = [float(one) for one in re.findall(r"about (\S+) GiB", answer["error"])]
    everything, blocks, half = figures
    assert blocks < everything / 4
    # By image as it was counted on a CPU; the weights in bfloat16 do not depend on the batch.
    record = json.loads((DOCS / "performance/results.json").read_text())
    counted = {row["name"]: row["kept_mib"] for row in record["sew_resnet34-bf16"]["rows"]}
    mib = (everything - half) * 1024 / 16
    assert mib == pytest.approx(counted["tetdist, none"], rel=0.02)
    assert "recompute=blocks about" in answer["error"]
    assert "batch.micro=16 about" in answer["error"]


def test_a_network_that_cannot_recompute_is_told_of_smaller_batches(monkeypatch):
    def computed(config, *_):
        if config.recompute != "none":
            raise UserError("recompute: a spikingjelly network cannot recompute")
        return config.batch.micro << 30

    monkeypatch.setattr(memory, "activation_bytes", computed)
    gpu = types.SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    config = loading.load("sew34_t4.yaml", ["data.root=none", "batch.micro=32"])
    text = memory.explanation(config, None, None)
    assert "batch.micro=32 needs about 32 GiB" in text
    assert "that it has; batch.micro=16 about 16 GiB, with the same images" in text


def test_gradients_are_added_up_in_a_few_launches(ask):
    """Not in one for each parameter, of which a sew_resnet34 has 110."""
    one, two = (ask("sew_resnet34", *ENGINES["torch"], micro_batches=n) for n in (1, 2))
    assert_runs(two)
    assert launches(two, "backward") <= 2 * launches(one, "backward") + 10


def test_a_moving_average_takes_a_few_launches(ask):
    """Not some for each of sew_resnet34's 182 tensors."""
    without, average = (
        ask("sew_resnet34", *ENGINES["torch"], *o, micro_batches=1)
        for o in ((), ("ema.decay=0.9",))
    )
    assert_runs(average)
    assert 3 <= launches(average, "loss") - launches(without, "loss") <= 12


@pytest.mark.parametrize("name", CASES)
def test_cases_of_check_gpu(name, running):
    """Networks take a micro-batch. Others take two in each of two steps, since timm's optimisers
    need to know from the second on whether the one before was undone; and in three, since
    DeepSpeed's throughput timer would begin with the third, and graphs replay by then."""
    case = {"precision": "bf16", "batch": 2} | CASES[name]
    if "model" in case:
        steps, case = 1, case | {"size": 32, "accumulation": 1}
    else:  # What is not of the network shows with a small one.
        dropping = {"arguments": {"drop_rate": 0.2}} if "arguments" in case else {}
        case |= {"model": "spiking_convnet", "size": 28, "accumulation": 2} | dropping
        steps = 3 if case["engine"] == "deepspeed" or "cuda_graphs" in case else 2
    if "optimizer" in case:
        case["accumulation"] = 8  # Of few kernels, timm's would be awaited.
    answer = running.made_up(case.pop("model"), steps, **case)
    assert bool(answer["captures"]) == ("cuda_graphs" in case)
    check = assert_zero_runs if "zero_stage" in case else CHECKS.get(case["precision"], assert_runs)
    check(answer)


def test_a_copy_for_a_checkpoint_does_not_wait(ask):
    line = "from tetdist import buffers; buffers.copy_to_host({0: [loss.detach()]}); predicted = l"
    fault = ("tetdist.training.step:sums_of", "predicted = l", line)
    assert_runs(ask("spiking_convnet", *ENGINES["torch"], fault=fault))


def test_an_evaluation_waits_once_and_is_deterministic(ask):
    answer = ask("spiking_convnet", *ENGINES["torch"], "deterministic=true", evaluates=True)
    assert_runs(answer)
    (wait,) = answer["evaluation_waits"]
    assert wait.startswith("numbers fetched at tetdist/evaluation/evaluate.py")


# --- CUDA graphs --------------------------------------------------------------------------------

# The engines' tests have what a graph cannot do.
GRAPHED = tuple(override for override in EVERYTHING if "sync" not in override)
GRAPHED += ("batch_norm.sync=false",)  # some recipes have it


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_are_in_the_graph(objective, ask):
    changes = [f"loss.distillation.{change}" for change in OBJECTIVES[objective]]
    answer = ask(
        "spiking_convnet",
        *GRAPHS,
        "loss.distillation.teacher=timm:resnet18",
        "loss.distillation.self_weight=0.5",
        *changes,
        learns=True,
    )
    assert_runs(answer)
    assert answer["captures"] == 2


def test_a_graph_is_one_launch(ask):
    answer = ask("spiking_convnet", *GRAPHS, steps=2, micro_batches=2)
    assert_runs(answer)
    assert launches(answer, "forward", "teacher", "backward") == 0
    assert answer["launches"]["loss"]["cuda.graph"] == 2
    # Besides, images and targets are copied to where it reads them, and its sums are added.
    assert launches(answer, "loss") == 1 + 4 * 2
    assert launches(answer, "update", "statistics") <= UPDATE_AND_STATISTICS
    # Captured once, and compared with each of four replays.
    assert answer["captures"] == 5


def test_graphs_of_several_timesteps_share_their_memory(ask):
    """A pool gives memory of one capture to another on the same stream alone. What the calls before
    a capture draw changes no random number."""
    answer = ask(
        "spiking_convnet",
        *GRAPHS,
        "phases.0.timesteps=[1, 2, 3, 4]",
        steps=8,
        fault=("tetdist.training.step:sums_of", "predicted = l", "loss.bernoulli(); predicted = l"),
    )
    assert_runs(answer)
    assert len(answer["captured_in"]) == 4
    assert len({tuple(map(str, where)) for where in answer["captured_in"]}) == 1
    # Each replay has drawn one.
    assert answer["replayed_at"] == list(range(8))


@pytest.mark.parametrize(("recompute", "precision"), [("blocks", "fp16"), ("segments", "bf16")])
def test_everything_in_a_graph(recompute, precision, ask):
    """Each micro-batch of two steps launches the same kernels, on the same memory, with the same
    numbers of the host."""
    answer = ask(
        "spiking_convnet",
        RECOMPUTE[recompute],
        *GRAPHS,
        *GRAPHED,
        f"precision={precision}",
        learns=True,
        steps=2,
        micro_batches=2,
    )
    assert answer["captures"] == 5
    CHECKS[precision](answer)


# --- with all that a configuration can ask for --------------------------------------------------

SHORT = [
    ("sew_resnet18", "blocks", "torch", "fp16"),
    ("vggsnn", "blocks", "deepspeed", "bf16"),
    ("i2e_msnet18", "blocks", "torch", "bf16"),
    ("sdt_2_256_dvs", "segments", "torch", "bf16"),
    ("espikeformer_t", "blocks", "torch", "bf16"),
]


@pytest.mark.parametrize(("model", "recompute", "engine", "precision"), SHORT)
def test_everything(model, recompute, engine, precision, ask):
    """One step with all that a configuration can ask for, dropping all that a network can drop."""
    rates = {"drop_rate", "drop_path_rate"}.intersection(models.arguments_of(model) or [])
    # More blocks of espikeformer are the same again.
    shallow = ["model.arguments={depths: [1, 1]}"] if model == "espikeformer_t" else []
    answer = ask(
        model,
        RECOMPUTE[recompute],
        *ENGINES[engine],
        *EVERYTHING,
        *shallow,
        *(f"model.arguments.{rate}=0.1" for rate in sorted(rates)),
        f"precision={precision}",
        learns=True,
    )
    CHECKS[precision](answer)
