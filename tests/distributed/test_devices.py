"""No run trains on the CPU by mistake, and processes divide the cores that they share."""

import os
import sys
import types

import pytest
import torch
import torch.distributed as dist

from tetdist.distributed import devices
from tetdist.distributed.devices import choose_device
from tetdist.distributed.world import World, _refuse_shared_gpus, _stay_near_gpu, cores_of, join
from tetdist.errors import UserError
from tetdist.nn.precision import choose_algorithms
from tetdist.training.engines.deepspeed_engines import _as_local_rank

TWO = 'print("GPU 0: NVIDIA A100 (UUID: GPU-1)\\nGPU 1: NVIDIA A100 (UUID: GPU-2)")'
NAMED = ["GPU 0: NVIDIA A100 (nvidia-smi) and 1 more", "torch does not see it", torch.__version__]


@pytest.mark.parametrize(
    ("wanted", "smi", "variables", "words"),
    [
        ("auto", TWO, {}, [*NAMED, "device=cpu"]),
        ("cpu", TWO, {}, None),
        ("auto", TWO, {"CUDA_VISIBLE_DEVICES": ""}, None),
        ("auto", TWO, {"CUDA_VISIBLE_DEVICES": "-1"}, None),
        ("cuda", TWO, {"CUDA_VISIBLE_DEVICES": "-1"}, ["CUDA_VISIBLE_DEVICES hides"]),
        ("auto", None, {}, None),
        ("auto", "print('No devices found.')", {}, None),
        ("auto", "raise SystemExit('no driver')", {}, None),
        ("auto", "print('GPU 0'); exit(9)", {}, None),
        ("auto", None, {"SLURM_GPUS_ON_NODE": "8"}, ["Slurm has granted", "SLURM_GPUS_ON_NODE=8"]),
        ("auto", None, {"SLURM_GPUS_ON_NODE": "0"}, None),
        # DeepSpeed and the rest do not part.
        ("auto", TWO, {"DS_ACCELERATOR": "cpu"}, None),
        ("cuda", TWO, {"DS_ACCELERATOR": "cpu"}, ["DS_ACCELERATOR=cpu"]),
    ],
)
def test_no_cpu_by_mistake(wanted, smi, variables, words, tmp_path, monkeypatch):
    """torch sees no GPU; nvidia-smi, in the only folder of PATH, may. Without words: the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"PATH": str(tmp_path)} | variables).items():
        monkeypatch.setenv(name, value)
    if smi is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!{sys.executable}\n{smi}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    if words is None:
        assert choose_device(wanted, 3).type == "cpu"
        return
    with pytest.raises(UserError) as caught:
        choose_device(wanted, 3)
    assert [word for word in words if word not in str(caught.value)] == []


def test_no_two_processes_take_one_gpu(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    # NCCL, Triton and "cuda" without a number take the current one.
    assert [choose_device("auto", 1)] == current == [torch.device("cuda", 1)]
    with pytest.raises(UserError, match="local rank 2 has no GPU of its own: torch sees 2"):
        choose_device("auto", 2)
    # Each process may see its own GPU as number 0, or all the same one, which only all together can
    # detect.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("auto", 2) == torch.device("cuda", 0)
    properties = types.SimpleNamespace(uuid="GPU-b")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    class Others(World):
        def gather(self, value):
            return ["GPU-a", value, "GPU-c", shown]

    shown = "GPU-d"
    _refuse_shared_gpus(Others(1, 4, torch.device("cuda", 0), None))
    shown = "GPU-b"
    with pytest.raises(UserError, match="ranks 1, 3 have the same GPU"):
        _refuse_shared_gpus(Others(1, 4, torch.device("cuda", 0), None))
    with pytest.raises(SystemExit):
        _refuse_shared_gpus(Others(3, 4, torch.device("cuda", 0), None))


def test_gpus_exchange_tensors_by_nccl_and_hosts_numbers_by_gloo(monkeypatch):
    """Gloo would take gradients through the host, and numbers by NCCL would wait for the GPU."""
    backends = []
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr("tetdist.distributed.world.choose_device", lambda *_: gpu)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: backends.append(backend))
    monkeypatch.setattr(dist, "new_group", lambda backend: backends.append(backend))
    assert join("cuda").device == gpu
    assert backends == ["nccl", "gloo"]


def test_a_task_of_srun_does_not_think_that_it_is_alone(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UserError, match="srun has started 2 tasks"):
        join("cpu")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    with join("cpu") as world:
        assert world.world_size == 1


@pytest.mark.parametrize(
    ("hosts", "cores"),
    [
        # srun gives each process its own cores; torchrun on two hosts lets both of each host use
        # all.
        ([("node1", [0, 1]), ("node1", [2, 3]), ("node2", [0, 1]), ("node2", [2, 3])], 2),
        ([("node1", [0, 1, 2, 3])] * 2 + [("node2", [0, 1, 2, 3])] * 2, 2),
        # Two and two share; and there are fewer cores than processes.
        ([("node1", [0, 1, 2, 3])] * 2 + [("node1", [4, 5, 6, 7])] * 2, 2),
        ([("node1", [0])] * 3, 1),
    ],
)
def test_cores_are_divided_among_those_of_a_host_who_share_them(monkeypatch, hosts, cores):
    class Gathered(World):
        def gather(self, value):
            assert value == hosts[0]
            return hosts

    monkeypatch.setattr("platform.node", lambda: hosts[0][0])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(hosts[0][1]))
    assert cores_of(Gathered(0, 4, torch.device("cpu"), None))[0] == cores


@pytest.mark.parametrize(
    ("cores", "lists", "bound"),
    [
        # Two processors, whose cores have two threads each; four processes on some cores.
        ([range(8)] * 2, ["0-1,4-5", "2-3,6-7"], [{0, 1, 4, 5}, {2, 3, 6, 7}]),
        ([range(6)] * 4, ["0-3", "0-3", "4-7", "4-7"], [{0, 1, 2, 3}] * 2 + [{4, 5}] * 2),
        # A machine with one processor or an unknown one; two GPUs at one of two processors.
        ([range(4)] * 2, ["0-3", "0-3"], [set(range(4))] * 2),
        ([range(4)] * 3, [None, "", "0-3"], [None, None, set(range(4))]),
        # Slurm has bound the processes, one to the processor of the other's GPU.
        ([range(4), range(4, 8)], ["4-7", "4-7"], [None, None]),
    ],
)
def test_processes_stay_near_their_gpus(cores, lists, bound, tmp_path, monkeypatch):
    """By a pretended /sys; cores of another host do not count."""
    monkeypatch.setattr(devices, "PCI", tmp_path)
    for gpu, listed in enumerate(lists):
        (tmp_path / f"0001:c{gpu}:1f.0").mkdir()
        if listed is not None:
            (tmp_path / f"0001:c{gpu}:1f.0/local_cpulist").write_text(f"{listed}\n")
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda gpu: types.SimpleNamespace(
            pci_domain_id=1, pci_bus_id=0xC0 + gpu.index, pci_device_id=0x1F
        ),
    )
    gathered = []

    class Gathered(World):
        def gather(self, value):
            gathered.append(value)
            return [*gathered, ("elsewhere", [99], [])]

    set_to = [None] * len(cores)
    for _ in range(2):  # at first to see what each tells the others
        gathered = gathered[-len(cores) :]
        for gpu, mine in enumerate(cores):
            monkeypatch.setattr(os, "sched_getaffinity", lambda _, mine=mine: set(mine))
            set_to[gpu] = None
            monkeypatch.setattr(
                os, "sched_setaffinity", lambda _, to, gpu=gpu: set_to.__setitem__(gpu, to)
            )
            _stay_near_gpu(Gathered(gpu, len(cores), torch.device("cuda", gpu), None))
    assert set_to == bound


@pytest.mark.parametrize("before", [None, "3"])
def test_deepspeed_gets_the_gpu_that_the_process_sees(monkeypatch, before):
    """With one visible GPU a process, local rank 3 has GPU 0."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if before:
        monkeypatch.setenv("LOCAL_RANK", before)
    with _as_local_rank(torch.device("cuda", 0)):
        assert os.environ["LOCAL_RANK"] == "0"
    assert os.environ.get("LOCAL_RANK") == before
    with _as_local_rank(torch.device("cpu")):
        assert os.environ["LOCAL_RANK"] == (before or "0")


def test_fp32_is_not_silently_tf32():
    try:
        choose_algorithms("tf32")
        assert torch.backends.cudnn.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
        choose_algorithms("fp32")
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.benchmark
        choose_algorithms("bf16", deterministic=True)
        assert not torch.backends.cudnn.benchmark
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        choose_algorithms("fp32")
