"""Check of the links: the rate at which processes average gradients."""

import contextlib
import platform
import re
import statistics
import subprocess
import time
from typing import Any

import torch

from tetdist.apps.check_gpu import remedies
from tetdist.apps.check_gpu.check import SLOW, TOO_SLOW, Finding, Machine, word
from tetdist.apps.roofline.cards import nvlink_of

MEGABYTES = 87  # the gradients of a sew_resnet34
# Fractions of the link's speed that are as expected, and slow: NCCL reaches half of it and more
# within a host, if it uses the link.
REACHED, SLOWLY = 0.4, 0.2
LEAST_IN_HOST = 5.0  # GB/s where the link is unknown: less than half of a PCIe 3.0 slot
# GB/s each way of a network of 100 Gbit/s, and the fraction of it that is slow: less is 10-Gbit
# Ethernet, with which averaging takes longer than the step.
BETWEEN_HOSTS, SLOWLY_BETWEEN_HOSTS = 12.5, 0.08
# GB/s of a PCIe lane, by generation.
LANES = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.97, 5: 3.94, 6: 7.56}
OFF = (
    "nvidia-smi nvlink --status shows the links that are off; the fabric manager must run "
    "(systemctl status nvidia-fabricmanager); then restart the machine"
)


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
    numbers: dict[str, Any] = {"seconds": median, "gb_per_s": bandwidth}
    numbers |= {"megabytes": megabytes, "hosts": hosts}
    text = (
        f"{'NCCL' if here.on_gpu else 'gloo'}, {world.world_size} processes, {hosts} "
        f"host{'s' * (hosts > 1)}: {1000 * median:.1f} ms for {megabytes} MB, {bandwidth:.1f} GB/s"
    )
    if here.small:
        return Finding("ok", text, None, numbers)
    between = hosts > 1
    also = "; a run on one host judges the links within it" if between else ""
    network = ("a 100-Gbit network", BETWEEN_HOSTS, remedies.NETWORK)
    link = network if between else link_of(here)
    if link is None:
        if bandwidth >= LEAST_IN_HOST:
            return Finding("ok", text, None, numbers)
        text += f", below the limit of {LEAST_IN_HOST:g}"
        return Finding("bad", text, remedies.NETWORK, numbers)
    name, speed, remedy = link
    # Networks between hosts may be many times as fast as 100 Gbit/s.
    fraction = min(bandwidth / speed, 1.0) if between else bandwidth / speed
    judged = word(fraction, REACHED, SLOWLY_BETWEEN_HOSTS if between else SLOWLY)
    numbers |= {"link": name, "link_gb_per_s": speed, "word": judged}
    text = f"{text}, {judged} for {name} ({round(speed, 1):g} GB/s){also}"
    advice = remedy if judged in (SLOW, TOO_SLOW) else None
    return Finding("bad" if judged == TOO_SLOW else "ok", text, advice, numbers)


def link_of(here: Machine) -> tuple[str, float, str] | None:
    """Return name, GB/s each way and remedy of the link between this GPU and others of its host;
    None: unknown."""
    properties = torch.cuda.get_device_properties(here.device)
    uuid, wanted = f"GPU-{properties.uuid}", nvlink_of(properties.name)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = remedies.nvidia_smi("nvlink", "--status", "-i", uuid)
        lanes = sum(map(float, re.findall(r": ([\d.]+) GB/s", answer)))
        if lanes and lanes >= 0.9 * wanted:
            return "NVLink", lanes, remedies.NETWORK
    if wanted:
        return "NVLink, which is off or partly off", wanted, OFF
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError, KeyError):
        answer = remedies.smi("pcie.link.gen.max,pcie.link.width.max", "-i", uuid)
        generation, width = map(int, answer.split(","))
        return f"PCIe {generation} x{width}", LANES[generation] * width, remedies.NETWORK
    return None
