"""Makes docs/results/hardware.md and .json from the runs of two studies, at commit d1ca4e46.

    python tools/study.py deployment --jobs 2
    python tools/study.py low_bit_relu --jobs 2
    python docs/make/deployment.py

Every run is evaluated in real numbers and in int8, and the networks trained with TET also with
their early exit, measured. Evaluations that exist are kept; delete RUN/deployment_*.json to repeat
one.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import pages

from tetdist.apps.cli import eval as eval_command
from tetdist.apps.studies.numbers import paired_difference
from tetdist.storage.files import parse_json
from tetdist.tables import markdown

DATA = {
    "digits": "MNIST digits, T=4",
    "cifar10": "CIFAR-10, 10,000 images, T=4",
    "nmnist": "N-MNIST, 500 recordings, T=10",
    "objects": "five objects, DVS128, T=10",
    "days": "five objects, another day, T=10",
}
ABOUT = {
    "title": "Accuracy in int8, early exit and energy",
    "question": (
        "What do networks trained with TET lose in int8, and do they take less energy than a "
        "low-bit ReLU network of the same structure?"
    ),
}
TEXT = """{accuracy}

Top-1 on the validation split, mean ± standard deviation over {seeds} seeds, in percent. *Differ*:
decisions of the validation samples that int8 changes, median. *Fine-tuned*: one epoch with
`quantize` at a tenth of the learning rate. *Low-bit ReLU*: the same structure trained for as many
epochs with activations of ceil(log2(T + 1)) bits, which sees a recording as one frame. Differences
are paired by seed, with 95 % intervals.

{costs}

Energy is an estimate ([assumptions and constants](../evaluation.md#energy)): a sample of the
validation split at T, weights of 8 bits, memory included, spikes sent as events or stored as
bitmaps. The network takes less energy than the ReLU network below the break-even spike rate. *With
early exit*: that of events times mean T / T, computed; the decision itself is not counted. *Early
exit*: samples leave the batch at the threshold that loses at most 0.5 points on held-out training
samples; the speed-up is that of images per second over whole passes, on {threads} of a shared
machine, and depends on it.

Numbers: [hardware.json](hardware.json). Commands, at commit d1ca4e46, the last one with `quantize`:
`python tools/study.py deployment --jobs 2`, `python tools/study.py low_bit_relu --jobs 2` and
`python docs/make/deployment.py`; the studies' own pages are
[deployment](deployment.md) and [low_bit_relu](low_bit_relu.md).
"""


def evaluated(run: Path, *arguments: str, name: str) -> dict[str, Any]:
    """Return an evaluation of a run, from its folder if it is there."""
    file = run / f"deployment_{name}.json"
    if not file.exists():
        print(f"{run.name}: {name}", flush=True)
        common = ["--checkpoint", str(run), "--json", str(file), "--threads", "1"]
        if code := eval_command.main([*common, *arguments]):
            sys.exit(code)
    return parse_json(file.read_bytes())


def numbers_of(runs: Path, data: str, seed: int) -> dict[str, Any]:
    """Return all numbers of a data set and a seed."""
    run = {one: runs / f"deployment/{data}{one}-seed{seed}" for one in ("", "_fine")}
    whole = evaluated(run[""], "--exit-within", "0.5", "--measured", name="real")
    int8 = evaluated(run[""], "--int8", name="int8")
    fine, fine_int8 = (
        evaluated(run["_fine"], *flags, name=name)
        for flags, name in (((), "real"), (("--int8",), "int8"))
    )
    relu, energy = evaluated(runs / f"low_bit_relu/{data}-seed{seed}", name="real"), whole["energy"]
    return {
        "samples": whole["samples"],
        "top1": {
            "real": whole["top1"],
            "int8": int8["top1"],
            "fine": fine["top1"],
            "fine_int8": fine_int8["top1"],
            "relu": relu["top1"],
        },
        "changed": {
            "int8": int8["real_numbers"]["changed"],
            "fine_int8": fine_int8["real_numbers"]["changed"],
        },
        "timesteps": whole["timesteps"],
        "early_exit": whole["measured_exit"],
        "spike_rate": energy["spike_rate"],
        "break_even_rate": energy["break_even_rate"],
        "activation_bits": energy["activation_bits"],
        "uj": {one: energy[one]["pj"]["total"] / 1e6 for one in ("spiking", "bitmaps", "relu")},
        "arithmetic_only_uj": {one: pj / 1e6 for one, pj in energy["arithmetic_only_pj"].items()},
    }


def exit_ratio(one: dict[str, Any]) -> float:
    """Return the energy with early exit, by its share of timesteps, over the ReLU network's."""
    share = one["early_exit"]["mean_timesteps"] / one["timesteps"]
    return float(share * one["uj"]["spiking"] / one["uj"]["relu"])


def described(values: list[float]) -> str:
    """Return the mean and the standard deviation of values."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def accuracy_table(found: dict[str, list[dict[str, Any]]]) -> str:
    head = ["data", "samples", "float32", "int8", "int8 - float32", "differ", "fine-tuned, float32"]
    head += ["fine-tuned, int8", "differ", "low-bit ReLU", "bits", "float32 - ReLU"]
    rows = []
    for data, seeds in found.items():
        top1 = {key: [one["top1"][key] for one in seeds] for key in seeds[0]["top1"]}
        differ = {key: [one["changed"][key] for one in seeds] for key in seeds[0]["changed"]}
        rows.append(
            [
                DATA[data],
                f"{seeds[0]['samples']:,}",
                described(top1["real"]),
                described(top1["int8"]),
                str(paired_difference(top1["int8"], top1["real"])),
                f"{median(differ['int8']):g}",
                described(top1["fine"]),
                described(top1["fine_int8"]),
                f"{median(differ['fine_int8']):g}",
                described(top1["relu"]),
                str(seeds[0]["activation_bits"]),
                str(paired_difference(top1["real"], top1["relu"])),
            ]
        )
    return markdown(head, rows, numbers=True)


def cost_table(found: dict[str, list[dict[str, Any]]]) -> str:
    head = ["data", "spike rate, %", "break-even, %", "energy, uJ: events", "bitmaps", "ReLU"]
    head += ["events / ReLU", "with early exit", "arithmetic only: spiking", "ReLU"]
    head += ["early exit: mean T", "top-1, %", "top-1 - ReLU", "speed-up"]
    rows = []
    for data, seeds in found.items():

        def middle(*keys: str, seeds: list[dict[str, Any]] = seeds) -> float:
            values: Any = seeds
            for key in keys:
                values = [one[key] for one in values]
            return mean(values)

        spiking, relu = middle("uj", "spiking"), middle("uj", "relu")
        rows.append(
            [
                DATA[data],
                f"{100 * middle('spike_rate'):.1f}",
                f"{100 * middle('break_even_rate'):.1f}",
                f"{spiking:.3g}",
                f"{middle('uj', 'bitmaps'):.3g}",
                f"{relu:.3g}",
                f"{spiking / relu:.2f}",
                f"{mean(map(exit_ratio, seeds)):.2f}",
                f"{middle('arithmetic_only_uj', 'spiking'):.3g}",
                f"{middle('arithmetic_only_uj', 'relu'):.3g}",
                f"{middle('early_exit', 'mean_timesteps'):.2f}",
                f"{middle('early_exit', 'top1'):.2f}",
                str(
                    paired_difference(
                        [one["early_exit"]["top1"] for one in seeds],
                        [one["top1"]["relu"] for one in seeds],
                    )
                ),
                f"{middle('early_exit', 'ratio'):.2f}",
            ]
        )
    return markdown(head, rows, numbers=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=pages.ROOT / "runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    found = {
        data: [numbers_of(options.runs, data, seed) for seed in options.seeds] for data in DATA
    }
    flat = [one for seeds in found.values() for one in seeds]
    lost = [
        mean(one["top1"]["real"] - one["top1"]["int8"] for one in seeds) for seeds in found.values()
    ]
    winning = [
        data
        for data, seeds in found.items()
        if all(one["spike_rate"] < one["break_even_rate"] for one in seeds)
    ]
    ratios = [
        mean(one["uj"]["spiking"] / one["uj"]["relu"] for one in seeds) for seeds in found.values()
    ]
    speed = [mean(one["early_exit"]["ratio"] for one in seeds) for seeds in found.values()]
    rates, even = ([100 * one[key] for one in flat] for key in ("spike_rate", "break_even_rate"))
    exits = [mean(map(exit_ratio, seeds)) for seeds in found.values()]
    lost_by_exit = [
        mean(one["top1"]["real"] - one["early_exit"]["top1"] for one in seeds)
        for seeds in found.values()
    ]
    answer = (
        f"In int8, top-1 changes by {-max(lost):+.2f} to {-min(lost):+.2f} points. With memory, "
        f"{len(winning)} of {len(found)} take less energy at T than the ReLU network: "
        f"{min(ratios):.1f} to {max(ratios):.1f} times its energy at {min(rates):.0f} to "
        f"{max(rates):.0f} % spikes, with break-even at {min(even):.1f} to {max(even):.1f} %. With "
        f"early exit {sum(ratio < 1 for ratio in exits)} of {len(found)} do ({min(exits):.1f} to "
        f"{max(exits):.1f} times, computed in proportion to timesteps), {min(speed):.1f} to "
        f"{max(speed):.1f} times as fast as without, for {min(lost_by_exit):.1f} to "
        f"{max(lost_by_exit):.1f} points of top-1."
    )
    threads = found["digits"][0]["early_exit"]["threads"]
    text = TEXT.format(
        accuracy=accuracy_table(found),
        costs=cost_table(found),
        seeds=len(options.seeds),
        threads="one thread" if threads == 1 else f"{threads} threads",
    )
    page = pages.RESULTS / "hardware.md"
    pages.write(page, ABOUT, answer, len(options.seeds), {"data": found}, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
