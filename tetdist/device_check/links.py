"""How fast the processes average gradients."""

import statistics
import time

import torch

from tetdist.device_check.check import Finding, Machine

MEGABYTES = 87  # the gradients of a sew_resnet34


def check_links(here: Machine) -> Finding:
    """Seconds and bandwidth of averaging as many gradients as a sew_resnet34 has."""
    world = here.world
    if world.world_size == 1:
        return Finding("left out", "one process averages nothing (torchrun --nproc-per-node N)")
    gradients = torch.ones(MEGABYTES * 10**6 // 4, device=here.device)
    seconds = []
    for _ in range(8):
        world.sum([0.0])
        started = time.perf_counter()
        world.mean_(gradients)
        if here.on_gpu:
            torch.cuda.synchronize(here.device)
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[3:])
    # What each link carries, however many there are: nccl-tests' "busbw".
    share = 2 * (world.world_size - 1) / world.world_size
    bandwidth = share * MEGABYTES / 1000 / median
    backend = "NCCL" if here.on_gpu else "gloo"
    return Finding(
        "ok",
        f"{backend}, {world.world_size} processes: {1000 * median:.1f} ms for {MEGABYTES} MB, "
        f"{bandwidth:.1f} GB/s",
        None,
        {"seconds": median, "gb_per_s": bandwidth, "megabytes": MEGABYTES},
    )
