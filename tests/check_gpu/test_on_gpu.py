"""What only a GPU can show, besides check_gpu: `make test-gpu`, on a machine that has one."""

import math

import pytest
import tiny

pytestmark = pytest.mark.gpu


def test_runs_train_and_evaluate_and_are_the_same_with_graphs(tiny_config, tmp_path):
    """With mixing, clipping, and two phases, so that a second graph is captured."""
    optimizer = {"kind": "sgd", "lr": 0.05, "momentum": 0.9}
    changes = {
        "model": {"name": "sew_resnet18"},
        "execution": "fused",
        "precision": "bf16",
        "device": "cuda",
        "deterministic": True,
        "gradient_clipping": 0.5,
        "data.mixup": 0.2,
        "data.image_size": 32,
        "data.resize": 32,
        "phases": [{"epochs": 1, "timesteps": t, "optimizer": optimizer} for t in (2, 1)],
    }
    environment = {k: v for k, v in tiny.clean_environment().items() if k != "DS_ACCELERATOR"}
    for name, engine, graphs in (
        ("plain", "torch", "false"),
        ("graphs", "torch", "true"),
        ("deepspeed", "deepspeed", "false"),
    ):
        file = tiny_config(changes | {"name": name, "engine": engine})
        command = tiny.python(tiny.TRAIN, "--config", file, f"cuda_graphs={graphs}")
        status, output = tiny.execute(command, tmp_path, env=environment, timeout=140)
        assert status == 0, output
        assert ("check_gpu" in output) == (graphs == "true")
        run = tmp_path / "runs" / name
        losses = [line["loss"] for line in tiny.metrics(run, "train")]
        assert len(losses) == 2 * tiny.STEPS_PER_EPOCH
        assert all(map(math.isfinite, losses))
        assert [line["samples"] for line in tiny.metrics(run, "val")] == [sum(tiny.VAL_SIZES)] * 2
        assert (tiny.newest(run) / "model.safetensors").is_file()
    tiny.assert_same_run(tmp_path / "runs/plain", tmp_path / "runs/graphs")
