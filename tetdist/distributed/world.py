"""This process among all processes of the run, and the collectives outside the engine."""

import os
import platform
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from tetdist.buffers import in_one_buffer
from tetdist.distributed import evidence, rendezvous
from tetdist.distributed.devices import choose_device, cores_near, keep_freed_memory
from tetdist.distributed.launchers import end_with_launchers
from tetdist.distributed.waiting import Waiting
from tetdist.errors import FailedElsewhere, UserError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# A collective waits this much longer than watchdog.py, which can name the missing process.
MARGIN = timedelta(seconds=60)


@dataclass(frozen=True)
class World:
    """This process among all of the run.

    Attributes:
        rank: Number of this process, 0 to world_size - 1.
        control: Group of CPU collectives for flags and numbers that the host needs, so that reading
            them does not wait for the GPU.
    """

    rank: int
    world_size: int
    device: torch.device
    control: Any

    @cached_property
    def waiting(self) -> Waiting:
        """Time in the collectives of training steps."""
        return Waiting(self.device)

    def sum(self, values: list[float]) -> list[float]:
        """Add values up element by element over all processes, in float64, on the host."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def mean_(self, tensor: Tensor) -> Tensor:
        """Average a tensor over all processes, in place."""
        if self.world_size == 1:
            return tensor
        with self.waiting.measured():
            if self.device.type == "cuda":
                # NCCL divides in the same kernel, which gloo cannot.
                dist.all_reduce(tensor, op=dist.ReduceOp.AVG)
            else:
                dist.all_reduce(tensor)
                tensor.div_(self.world_size)
        return tensor

    def mean_all_(self, tensors: list[Tensor]) -> None:
        """Average tensors over all processes, in place.

        Args:
            tensors: Tensors of the same shapes, types and strides on every process.
        """
        if self.world_size == 1:
            return
        for dtype in {tensor.dtype: None for tensor in tensors}:
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat, parts = in_one_buffer(same)
            self.mean_(flat)
            torch._foreach_copy_(same, parts)

    def from_rank_0(self, value: Any) -> Any:
        """Return rank 0's value (numbers, text, lists of them) on every process."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value (numbers, text, lists of them), by rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def gather_on_rank_0(self, tensor: Tensor) -> Tensor | None:
        """Return the tensors (N) of all processes, by rank, as one on rank 0; None elsewhere."""
        if self.world_size == 1:
            return tensor
        whole = tensor.new_empty(self.world_size, len(tensor)) if self.rank == 0 else None
        dist.gather(tensor, None if whole is None else list(whole))
        return None if whole is None else whole.view(-1)

    def gather_numbers(self, values: list[float]) -> list[list[float]]:
        """Return every process's numbers, equally many, by rank: one collective without pickle."""
        own = torch.tensor(values, dtype=torch.float64)
        gathered = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(gathered, own, group=self.control)
        return [numbers.tolist() for numbers in gathered]

    def make_store(self) -> rendezvous.SignedStore:
        """Make a store on rank 0 that only the processes of the run can write to.

        All processes must call this together.
        """
        store = rendezvous.open_store() if self.rank == 0 else None
        port, secret = self.from_rank_0((store and store.port, secrets.token_hex(16)))
        return rendezvous.SignedStore(
            store or rendezvous.connect(rendezvous.address(), port), secret
        )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the body of the context on every process; if it fails on some, fail on all.

        Raises:
            UserError: The body's error (of this or any other type), on the lowest rank where it
                failed.
            FailedElsewhere: Status 2, on all other ranks.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        failed = self.gather(failure is not None)
        if failure is not None and failed.index(True) == self.rank:
            raise failure
        if any(failed):
            raise FailedElsewhere(2)

    def wait_for_device(self) -> None:
        """Wait until the GPU has finished its queued work; the host runs some steps ahead."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def join(
    device: str,
    timeout: float = 600,
    shared_folder: Path | None = None,
    run: Mapping[str, Any] = MappingProxyType({}),
) -> World:
    """Join the other processes as the launcher's environment says; without a launcher, run alone.

    If another library has initialised torch's process group, that is used.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        timeout: Maximum number of seconds that a process may keep the others waiting.
        shared_folder: A folder of the run that all hosts share.
        run: Values that all processes of the run have in common, by name.

    Raises:
        UserError: Only some of the launcher's variables are set, or none although srun has started
            several tasks; torch sees no GPU where one is expected, or one for several processes;
            the port is in use; or rank 0 is of another run.
        PeerFailed: Not all processes have joined.
    """
    if dist.is_initialized():  # by another library, which knows the launcher
        this_device = choose_device(device, _number("LOCAL_RANK", 0, 2**20))
        control = dist.new_group(backend="gloo")
        return World(dist.get_rank(), dist.get_world_size(), this_device, control)
    present = [name for name in _VARIABLES if name in os.environ]
    launched = bool({"RANK", "WORLD_SIZE"} & set(present))
    # LOCAL_RANK and the master's address mean nothing without these two.
    if not launched:
        _refuse_to_be_alone_under_srun()
        rank, world_size, local_rank = 0, 1, 0
    elif len(present) == len(_VARIABLES):
        world_size = _number("WORLD_SIZE", 1, 2**20)
        rank, local_rank = (_number(name, 0, world_size - 1) for name in ("RANK", "LOCAL_RANK"))
        _number("MASTER_PORT", 1, 65_535)
    else:
        absent = [name for name in _VARIABLES if name not in os.environ]
        raise UserError(
            f"the distributed environment is incomplete: {', '.join(present)} set, but not "
            f"{', '.join(absent)}; unset them all to run alone, or use a launcher (deepspeed, "
            "torchrun)"
        )
    this_device = choose_device(device, local_rank)
    if this_device.type == "cpu":
        keep_freed_memory()
    backend = "nccl" if this_device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout) + MARGIN
    evidence.record_collectives()
    if not launched:
        # A launcher may also start a single process.
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit
        )
        return World(0, 1, this_device, dist.new_group(backend="gloo"))
    end_with_launchers()
    store = rendezvous.join(rank, world_size, timeout, shared_folder, run)
    with rendezvous.limited(timeout, "a process is lost while all connect to each other"):
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=limit
        )
        world = World(rank, world_size, this_device, dist.new_group(backend="gloo"))
        if this_device.type == "cuda":
            _refuse_shared_gpus(world)
            _stay_near_gpu(world)
        cores, processes = cores_of(world)
        # Otherwise each process would use all cores, and they would spin waiting for each other.
        if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(cores)
    return world


def _number(name: str, least: int, most: int) -> int:
    """Return a number of the launcher's environment; 0 if it is not set."""
    text = os.environ.get(name, "0")
    if not re.fullmatch(r"\d{1,7}", text, re.ASCII) or not least <= int(text) <= most:
        raise UserError(
            f"{name}={text[:40]} in the environment must be an integer from {least} to {most}; "
            "use a launcher (deepspeed, torchrun), or unset its variables to run alone"
        )
    return int(text)


def cores_of(world: World) -> tuple[int, int]:
    """Return the number of cores for this process and of processes on its host.

    With that many cores per process none waits for another. All processes must call this together.
    Cores that Slurm gives to one process are not divided again; launchers on one host let every
    process use all cores.
    """
    host, mine = platform.node(), sorted(os.sched_getaffinity(0))
    on_host = [cores for there, cores in world.gather((host, mine)) if there == host]
    sharing = sum(not set(mine).isdisjoint(cores) for cores in on_host)
    return max(1, len(mine) // sharing), len(on_host)


def _stay_near_gpu(world: World) -> None:
    """Keep this process and its further threads on those of its cores that are near its GPU.

    From other cores, launches and copies cross from one processor to the other. All processes keep
    all their cores if some cores of the host are near none of their GPUs: loading data needs them.
    """
    host, mine = platform.node(), os.sched_getaffinity(0)
    near = mine & cores_near(world.device)
    gathered = world.gather((host, sorted(mine), sorted(near)))
    allowed, used = (
        {core for there, *cores in gathered if there == host for core in cores[i]} for i in (0, 1)
    )
    if near and allowed == used:
        os.sched_setaffinity(0, near)


def _refuse_shared_gpus(world: World) -> None:
    """Make sure that no two processes share a GPU, as happens if a launcher hides all but one.

    Raises:
        UserError: Two do; raised on the lowest rank of them.
        SystemExit: Two do; raised on all other ranks.
    """
    own = str(torch.cuda.get_device_properties(world.device).uuid)
    ranks: dict[str, list[int]] = {}
    for rank, gpu in enumerate(world.gather(own)):
        ranks.setdefault(gpu, []).append(rank)
    for sharing in ranks.values():
        if len(sharing) > 1:
            if world.rank != sharing[0]:
                raise SystemExit(2)
            raise UserError(
                f"ranks {', '.join(map(str, sharing))} have the same GPU on {platform.node()}, as "
                f"its UUID shows (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}); "
                "start one process per GPU, and let each see all GPUs or only its own"
            )


def _refuse_to_be_alone_under_srun() -> None:
    """Refuse to be one of several tasks that srun started without a launcher.

    Each task would train by itself, all into one folder.
    """
    # srun sets it, but not for the batch script, which always runs alone.
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    if tasks > 1:
        raise UserError(
            f"srun has started {tasks} tasks, which cannot find each other: submit a run with "
            "launch/slurm.py, start another command on all GPUs with `srun --ntasks-per-node=1 "
            "torchrun ...`, or start a single process with srun --ntasks=1"
        )


# The world of a process that trains nothing.
ALONE = World(0, 1, torch.device("cpu"), control=None)
