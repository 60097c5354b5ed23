"""Check of the links: the rate at which processes average gradients."""

import platform
import statistics
import time

import torch

from tetdist.apps.check_gpu import remedies
from tetdist.apps.check_gpu.check import Finding, Machine

MEGABYTES = 87  # the gradients of a sew_resnet34
# GB/s below which the GPUs are not connected properly. In a host: less than half of a PCIe 3.0
# slot, so over the host's memory or its network. Between hosts: no more than 10-Gbit Ethernet, with
# which averaging takes longer than the step.
LEAST_IN_HOST, LEAST_BETWEEN_HOSTS = 5.0, 1.0


def check_links(here: Machine) -> Finding:
    """Measure time and bandwidth of averaging the gradients of a sew_resnet34."""
    world = here.world
    if world.world_size == 1:
        return Finding("left out", "one process averages nothing; use torchrun --nproc-per-node N")
    hosts = len(set(world.gather(platform.node())))
    megabytes = 8 if here.small else MEGABYTES
    gradients = torch.ones(megabytes * 10**6 // 4, device=here.device)
    seconds = []
    for _ in range(8):
        world.sum([0.0])
        started = time.perf_counter()
        world.mean_(gradients)
        world.wait_for_device()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[3:])
    # Traffic of each link, independent of their number: nccl-tests' "busbw".
    traffic = 2 * (world.world_size - 1) / world.world_size
    bandwidth = traffic * megabytes / 1000 / median
    numbers = {"seconds": median, "gb_per_s": bandwidth, "megabytes": megabytes, "hosts": hosts}
    text = (
        f"{'NCCL' if here.on_gpu else 'gloo'}, {world.world_size} processes, {hosts} "
        f"host{'s' * (hosts > 1)}: {1000 * median:.1f} ms for {megabytes} MB, {bandwidth:.1f} GB/s"
    )
    least = LEAST_IN_HOST if hosts == 1 else LEAST_BETWEEN_HOSTS
    if not here.small and not bandwidth >= least:
        return Finding("bad", f"{text}, below the limit of {least:g}", remedies.NETWORK, numbers)
    return Finding("ok", text, None, numbers)
