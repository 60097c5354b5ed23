"""Measure speed and memory, and write docs/performance.md and its figures.

    python docs/make/performance.py --results runs/performance --output docs/performance.md

Every measurement is a call of tools/bench.py. Results in the results folder are not measured again,
so the same command continues after a stop. It takes some twenty minutes on two cores. spikingjelly
is measured, too, if it is installed.
"""

import argparse
import datetime
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetdist.distributed.starters import as_starter
from tetdist.tables import markdown
from tetdist.wording import counted

PROJECT = Path(__file__).resolve().parents[2]
BENCH = PROJECT / "tools" / "bench.py"
TIMESTEPS = (1, 2, 4, 8, 16)
BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Measurement:
    """One call of tools/bench.py, and the name of its result."""

    name: str
    arguments: str

    def command(self, options: argparse.Namespace) -> list[str]:
        words = shlex.split(self.arguments)
        if options.quick:
            words += ["--size", "64"] + (["--repeats", "1"] if words[0] != "memory" else [])
        if options.device != "cpu":
            words += ["--device", options.device]
        return words


def measurements(options: argparse.Namespace) -> list[Measurement]:
    # spikingjelly has these networks, and none of the others in the same form.
    peer = " --spikingjelly eager" if options.spikingjelly else ""
    network = "sew_resnet18" if options.quick else "sew_resnet34"
    found = []
    for precision in ("fp32", "bf16"):
        step = f"step --model {network} --precision {precision}"
        found += [
            Measurement(f"step-{precision}", f"{step} --modes none,blocks,timesteps{peer}"),
            Measurement(f"evaluation-{precision}", f"{step} --evaluate{peer}"),
            Measurement(
                f"memory-{precision}",
                f"memory --model {network} --precision {precision} "
                f"--timesteps {','.join(map(str, timesteps_of(options)))}{peer}",
            ),
        ]
        found += [
            Measurement(f"timesteps-{t}-{precision}", f"{step} --timesteps {t} --repeats 3{peer}")
            for t in timesteps_of(options)
        ]
        found += [
            Measurement(f"batch-{b}-{precision}", f"{step} --batch {b} --repeats 3{peer}")
            for b in batches_of(options)
        ]
    if options.spikingjelly and not options.quick:
        # Its compilation in bf16 on a CPU did not end within eight minutes.
        more = "--precision fp32 --spikingjelly compiled"
        found.append(Measurement("compiled-fp32", f"step --model {network} {more}"))
    if not options.quick:
        for name, more in OTHER_NETWORKS:
            for precision in ("fp32", "bf16"):
                found.append(
                    Measurement(f"{name}-{precision}", f"step {more} --precision {precision}")
                )
        for name, timesteps in TRANSFORMERS:
            for precision in ("fp32", "bf16"):
                options_of = f"--model {name} --precision {precision} --modes none,blocks"
                options_of += f"{peer if name in PEERS else ''} --timesteps {timesteps}"
                found += [
                    Measurement(f"{name}-{precision}", f"step {options_of} --repeats 5"),
                    Measurement(f"{name}-memory-{precision}", f"memory {options_of}"),
                ]
        for name, timesteps in STREAMS:
            for precision in ("fp32", "bf16"):
                stream = f"stream --model {name} --precision {precision} --timesteps {timesteps}"
                found.append(Measurement(f"stream-{name}-{precision}", f"{stream} --threads 1"))
                for threads in (1, 2) if name in INTEGERS else ():
                    more = f"--threads {threads} --repeats 9"
                    found.append(
                        Measurement(f"int8-{threads}-{name}-{precision}", f"{stream} {more}")
                    )
        for name, timesteps in STREAMS[:3]:
            for precision in ("fp32", "bf16"):
                stream = f"stream --model {name} --precision {precision} --timesteps {timesteps}"
                exits = "--batch 64 --exits 1.75 --threads 2 --repeats 9"
                found.append(Measurement(f"exits-{name}-{precision}", f"{stream} {exits}"))
    if options.device == "cpu":
        found += [
            Measurement("scaling-1", f"scaling --model {network}"),
            Measurement("scaling-4", f"scaling --model {network} --accumulation 4 --steps 1"),
            Measurement("data", data_arguments(options)),
        ]
    return found


def data_arguments(options: argparse.Namespace) -> str:
    source = f" --data {shlex.quote(str(options.data))}" if options.data else ""
    few = " --images 64 --batch 8 --batches 2" if options.quick else ""
    return f"data --wait --epochs 5{source}{few}"


OTHER_NETWORKS = (
    ("spiking_resnet34-T4", "--model spiking_resnet34"),
    ("spiking_resnet34-T6", "--model spiking_resnet34 --timesteps 6"),
    ("preact_resnet34", "--model preact_resnet34"),
    ("ms_resnet34", "--model ms_resnet34"),
    ("psn_sew_resnet34", "--model psn_sew_resnet34"),
    ("vggsnn", "--model vggsnn --timesteps 10 --batch 8"),
    ("spiking_resnet19", "--model spiking_resnet19 --batch 16"),
)


# And T.
TRANSFORMERS = (
    ("qkformer_10_384", 4),
    ("sdt_8_384", 4),
    ("maxformer_10_384", 4),
    ("espikeformer_s", 1),
)
# Those that the benchmark has in spikingjelly's form.
PEERS = tuple(name for name, _ in TRANSFORMERS[:2])


# One timestep at a time. And T.
STREAMS = (
    ("spiking_convnet", 4),
    ("spiking_convnet_dvs", 10),
    ("ms_resnet14_cifar", 4),
    ("sew_resnet34", 4),
    ("sdt_2_256_cifar", 4),
)
# Those that have whole numbers.
INTEGERS = tuple(name for name, _ in STREAMS[:4])


def timesteps_of(options: argparse.Namespace) -> tuple[int, ...]:
    return TIMESTEPS[:2] if options.quick else TIMESTEPS


def batches_of(options: argparse.Namespace) -> tuple[int, ...]:
    if options.device == "cuda":
        return (16, 32, 64, 128, 256)
    return BATCHES[1:3] if options.quick else BATCHES


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="docs/make/performance.py", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--results", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.md")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="folder of JPEGs (default: synthetic ones)"
    )
    parser.add_argument(
        "--gpu", type=Path, metavar="FILE.json", help="result of tools/check_gpu.py --json"
    )
    parser.add_argument("--quick", action="store_true", help="measure little, as a smoke test")
    options = parser.parse_args(arguments)
    options.spikingjelly = importlib.util.find_spec("spikingjelly") is not None
    options.results.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    all_of_them = measurements(options)
    for number, measurement in enumerate(all_of_them, start=1):
        file = options.results / f"{measurement.name}.json"
        if not file.is_file():
            print(f"[{number}/{len(all_of_them)}] {measurement.name}", file=sys.stderr, flush=True)
            command = [sys.executable, str(BENCH), *measurement.command(options)]
            # The time of compiling is measured, too, so that nothing may be found in the cache.
            uncached = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
            done = subprocess.run(
                [*command, "--json", str(file)],
                stdout=subprocess.DEVNULL,
                env={
                    **os.environ,
                    **as_starter(),
                    **(uncached if "compiled" in measurement.arguments else {}),
                },
            )
            if done.returncode:
                print(f"error: {shlex.join(command)} failed", file=sys.stderr)
                return 1
        found[measurement.name] = json.loads(file.read_text())
    if found.get("data", {}).get("data"):
        found["data"]["data"] = Path(found["data"]["data"]).name
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figures = draw(found, options)
    (figures / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    options.output.write_text(report(found, options, figures))
    print(f"written: {options.output}")
    return 0


# --- as text ------------------------------------------------------------------------------------


def report(found: dict[str, dict[str, Any]], options: argparse.Namespace, figures: Path) -> str:
    machine = found["step-fp32"]["machine"]
    step = found["step-fp32"]
    # The data's path on this machine is of no use to a reader.
    data = Path(options.data.name) if options.data else None
    shown = argparse.Namespace(**vars(options) | {"data": data})
    commands = "\n".join(
        f"    python tools/bench.py {shlex.join(m.command(shown))}" for m in measurements(shown)
    )
    network = step["model"]
    size = step["size"] or 224
    peer = (
        f"spikingjelly {machine['spikingjelly']}, its network of the same name with the same neuron"
        if "spikingjelly" in machine
        else "missing: it was not installed"
    )
    parts = [
        f"""# Performance, measured

After this page you know the time and memory of a training step, and how to measure them yourself.

```
python tools/bench.py step --model sew_resnet34 --precision bf16        # time of a step
python tools/bench.py memory --model sew_resnet34 --precision bf16       # activation memory
python tools/bench.py --help                                             # everything else
```

Made by `python docs/make/performance.py --results FOLDER --output docs/performance.md`, which keeps
its measurements in FOLDER, on {datetime.date.today():%-d %B %Y}; {machine["device"]},
{machine["threads"]} threads, Python {machine["python"]}, torch {machine["torch"]}.

* **Contestants.** "ReLU" is the ReLU network with the same convolutions (timm's ResNet) on T times
  the batch, in channels_last memory. "spikingjelly" is {peer}.
* **Step.** The forward pass, the TET loss and the backward pass on random images, without the
  update.
* **Times.** The contestants of one command (see the end of this page) take turns, step by step.
  Times are medians, and ratios are medians of each round's ratio.
* **Processes.** On a CPU each contestant is a separate process. A thread that waits for the others
  either sleeps ("passively", OMP_WAIT_POLICY=PASSIVE) or checks again and again ("actively", the
  variable is not set). tetdist waits passively, as in training; each other contestant waits in the
  way that is faster for it.""",
        f"""## {network}, T=4, {size} pixels, batch {step["batch"]}

{step_table(found, "step")}

"blocks" and "timesteps" are `recompute: blocks` and `recompute: {{timesteps: 2}}`. The first two
steps also build kernels that are not in the cache, which takes 2 to 9 s, once per machine.
{compiled_peer(found)}

Evaluation (forward pass only):

{step_table(found, "evaluation")}{older(found)}""",
    ]
    if not options.quick:
        parts.append(f"## Other networks\n\n{other_table(found)}")
        parts.append(f"## Transformers, 224 pixels\n\n{transformers_text(found)}")
    parts += [
        f"""## Scaling with T

![Seconds of a step and memory against T]({figures.name}/timesteps.png)

{series_table(found, "timesteps", "T")}

MiB an image kept for the backward pass: after the forward pass, and in parentheses the maximum
until the end of the backward pass.

{memory_tables(found)}""",
        f"""## Scaling with the batch size

![Seconds of an image against the batch]({figures.name}/batch.png)

{series_table(found, "batch", "batch")}""",
    ]
    if not options.quick:
        parts.append(f"## One timestep at a time\n\n{stream_text(found)}")
        parts.append(f"## One timestep in int8\n\n{integer_text(found)}")
    if "scaling-1" in found:
        parts.append(f"## Several processes\n\n{scaling_text(found)}")
    if "data" in found:
        parts.append(f"## Data loading\n\n{data_text(found['data'])}")
    if options.gpu:
        parts.append(gpu_text(json.loads(options.gpu.read_text())))
    if gpu := gpu_section(options.output):
        parts.append(gpu)
    parts.append((LIMITS + (DAYS if older(found) else "")).strip())
    parts.append(f"## All commands\n\n{commands}")
    return "\n\n".join(parts) + "\n"


def stream_text(found: dict[str, dict[str, Any]]) -> str:
    """The section about streams."""
    columns = ["T=1 pass", "stream, a step", "onnxruntime, a step", "spikingjelly, single step"]
    rows = []
    for network, timesteps in STREAMS:
        for precision in ("fp32", "bf16"):
            measured = {r["name"]: r for r in found[f"stream-{network}-{precision}"]["rows"]}
            cells = [f"{measured[c]['ms']:.2f}" if c in measured else "" for c in columns]
            ratio = f"{measured['stream, a step']['ratio']:.3f}"
            whole = f"{measured[f'whole pass, T={timesteps}']['ms']:.2f} (T={timesteps})"
            rows.append([network, precision, *cells, ratio, whole])
    head = ["network", "", *columns, "stream / T=1 pass", "whole pass"]
    exit_head = [
        "network",
        "T",
        "",
        "whole pass",
        "stream with exits",
        "ratio",
        "onnxruntime with exits",
    ]
    exits = []
    for network, timesteps in STREAMS[:3]:
        for precision in ("fp32", "bf16"):
            one = found[f"exits-{network}-{precision}"]
            ms = {row["name"]: row["ms"] for row in one["rows"]}
            whole, left = ms[f"whole pass, T={timesteps}"], ms["stream with exits"]
            onnx = ms.get("onnxruntime with exits")
            rates = [
                f"{1e3 * one['batch'] / value:,.0f}" if value else ""
                for value in (whole, left, onnx)
            ]
            exits.append(
                [network, str(timesteps), precision, *rates[:2], f"{whole / left:.2f}", rates[2]]
            )
    return f"""Milliseconds of one timestep of one sample on one thread. `model.stream()` carries
membranes ([One timestep at a time](extending.md#one-timestep-at-a-time)). onnxruntime runs the
graph of `export --format onnx-step`.

{markdown(head, rows)}

Images a second at batch 64 on two threads, where samples leave the batch after 1.75 timesteps on
average, as with early exit (`eval --exit-within X --measured`). Each timestep decides the same
fraction of the samples that are left.

{markdown(exit_head, exits)}"""


def integer_text(found: dict[str, dict[str, Any]]) -> str:
    """The section about whole numbers."""
    rows = []
    for network in INTEGERS:
        for threads in (1, 2):
            real, half = (
                {row["name"]: row["ms"] for row in found[f"int8-{threads}-{network}-{one}"]["rows"]}
                for one in ("fp32", "bf16")
            )
            streams = (one["stream, a step"] for one in (real, half))
            graphs = [real[f"onnxruntime, a step{one}"] for one in ("", " in int8")]
            cells = [f"{value:.2f}" for value in (*streams, *graphs)]
            rows.append([network, str(threads), *cells, f"{graphs[1] / graphs[0]:.2f}"])
    head = ["network", "threads", "stream, fp32", "stream, bf16", "onnxruntime, fp32"]
    head += ["onnxruntime, int8", "int8 / fp32"]
    return f"""Milliseconds of one timestep of one sample. int8 is the graph of
`export --format onnx-step --int8` ([Whole numbers](weights.md#whole-numbers)), whose sums and
membranes are int32. The ratio is of onnxruntime's two graphs, measured in turns.

{markdown(head, rows)}"""


def gpu_text(found: dict[str, Any]) -> str:
    """Make the section about a GPU from the results of tools/check_gpu.py."""
    checks = found["checks"]
    rows = [[name, one["status"], one["text"]] for name, one in checks.items()]
    rates = [
        [batch, name.replace("relu", "ReLU"), *gpu_cells(row)]
        for batch, by_name in checks.get("rates", {}).get("by_batch", {}).items()
        for name, row in by_name.items()
    ]
    head = ["batch", "sew_resnet34, T=4, bf16", "images/s", "of ReLU's rate", "at most, GiB"]
    return f"""## A GPU, measured

`python tools/check_gpu.py --json FILE.json` with {counted(found["processes"], "process")} on
{found["machine"]["device"]}, torch {found["machine"]["torch"]}, made {found["made"]}.

{markdown(["check", "", ""], rows)}

{markdown(head, rates)}"""


def gpu_cells(row: dict[str, Any]) -> list[str]:
    """Format a contestant's rate, also relative to ReLU's, and its memory."""
    if row.get("out_of_memory"):
        return ["out of memory", "", ""]
    return [
        f"{row['images_per_s']:.0f}",
        f"{1 / row['ratio']:.2f}" if row["ratio"] else "",
        f"{row['peak_mib'] / 1024:.1f}" if row["peak_mib"] else "",
    ]


def gpu_section(page: Path) -> str:
    """Return the section that docs/make/gpu.py has written into the page, if any."""
    text = page.read_text() if page.is_file() else ""
    found = re.search(r"^## The GPU path, computed\n.*?(?=^## |\Z)", text, re.M | re.S)
    return found[0].strip() if found else ""


LIMITS = """
## Limits

* **GPUs.** No GPU has run these kernels: "The GPU path, computed" is arithmetic.
* **Other programs** used this machine at times. Compare seconds only within a run; ratios are
  within a run.
"""
DAYS = """\
* **Days.** On 25 November the machine was about twice as fast. Seconds of that day cannot be
  compared with those of other days; memory can.
"""
# Words for what tools/bench.py records of the threads that wait.
WAITING = {"asleep": "passively", "spinning": "actively"}


def step_table(found: dict[str, dict[str, Any]], kind: str) -> str:
    rows = [
        [
            precision,
            row["name"].replace("relu", "ReLU"),
            f"{row['seconds']:.3f}",
            f"{row['ratio']:.3f}",
            f"{row['images_per_s']:.2f}",
            f"{row['warm_up']:.1f}",
            WAITING.get(row.get("waiting"), ""),
        ]
        for precision in ("fp32", "bf16")
        for row in found[f"{kind}-{precision}"]["rows"]
    ]
    head = ["", "", "s", "/ ReLU", "images/s", "first two steps, s", "threads wait"]
    return markdown(head, rows)


def older(found: dict[str, dict[str, Any]]) -> str:
    """Return a note on sections that an earlier measurement made."""
    if all(
        "waiting" in row
        for name in found
        for row in found[name].get("rows", ())
        if name.startswith(("timesteps", "batch"))
    ):
        return ""
    return """

The sections below, except those that name another day, "Several processes" and "Data loading",
were measured on 25 November 2026. On that day all contestants took turns in one process whose
threads waited passively. The tables above were also measured in that way, for comparison:

| times the ReLU network's step, 25 November | fp32 | bf16 |
| --- | --- | --- |
| spikingjelly | 1.43 | 1.93 |
| tetdist | 0.97 | 1.00 |"""


def compiled_peer(found: dict[str, dict[str, Any]]) -> str:
    if "compiled-fp32" not in found:
        return ""
    relu, own, peer = found["compiled-fp32"]["rows"]
    return f"""

spikingjelly compiled by torch.compile, fp32, in a separate run:

| network | s | / ReLU | compilation, s |
| --- | --- | --- | --- |
| ReLU | {relu["seconds"]:.3f} | 1.000 | |
| tetdist | {own["seconds"]:.3f} | {own["ratio"]:.3f} | |
| spikingjelly, compiled | {peer["seconds"]:.3f} | {peer["ratio"]:.3f} | {peer["warm_up"]:.0f} |

In bf16 the compilation had not ended after eight minutes on this machine."""


def other_table(found: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, _ in OTHER_NETWORKS:
        results = [found[f"{name}-{precision}"] for precision in ("fp32", "bf16")]
        cells = []
        for result in results:
            relu, own = result["rows"]
            cells += [f"{relu['seconds']:.3f}", f"{own['seconds']:.3f}", f"{own['ratio']:.3f}"]
        first = results[0]
        rows.append([first["model"], str(first["timesteps"]), str(first["batch"]), *cells])
    head = ["", "T", "batch", "ReLU fp32, s", "tetdist, s", "ratio", "ReLU bf16, s", "tetdist, s"]
    return markdown([*head, "ratio"], rows)


def transformers_text(found: dict[str, dict[str, Any]]) -> str:
    rows = []
    for network, _ in TRANSFORMERS:
        for precision in ("fp32", "bf16"):
            of_steps = found[f"{network}-{precision}"]
            steps = {row["name"]: row for row in of_steps["rows"]}
            memory = found[f"{network}-memory-{precision}"]["rows"]
            for kept in memory:
                step = steps.get(kept["name"])  # without recomputation alone, if time was short
                whole = memory[-1 if memory[-1]["name"].startswith("spikingjelly") else 0]
                fraction = kept["after_forward_mib"] / whole["after_forward_mib"]
                rows.append(
                    [
                        network,
                        str(of_steps["timesteps"]),
                        str(of_steps["batch"]),
                        precision,
                        kept["name"],
                        f"{step['seconds']:.3f}" if step else "",
                        f"{step['ratio']:.3f}" if step else "",
                        WAITING.get(step.get("waiting"), "") if step else "",
                        f"{kept['after_forward_mib']:.1f} ({kept['at_most_mib']:.1f})",
                        f"{fraction:.2f}",
                    ]
                )
    head = [
        "",
        "T",
        "batch",
        "",
        "",
        "s",
        "/ first",
        "threads wait",
        "MiB an image (at most)",
        "fraction",
    ]
    peer = found[f"{TRANSFORMERS[0][0]}-fp32"]["rows"][-1]["name"].startswith("spikingjelly")
    text = """

spikingjelly's network has torch's layers and spikingjelly's neurons in multi-step mode, built like
the authors' code (tetdist/apps/benchmarks/peers.py; a test compares its logits with ours). MiB
are kept for the backward pass, as below; the last column is their fraction of spikingjelly's.
Empty cells were not measured.
The benchmark no longer has the last two networks in spikingjelly's form."""
    return markdown(head, rows) + (text if peer else "")


def series(
    found: dict[str, dict[str, Any]], key: str, precision: str
) -> dict[str, dict[int, dict[str, Any]]]:
    """Make rows by contestant and by T or batch."""
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for name, result in found.items():
        if name.startswith(f"{key}-") and name.endswith(precision):
            for row in result["rows"]:
                by_name.setdefault(row["name"], {})[result[key]] = row
    return by_name


def series_table(found: dict[str, dict[str, Any]], key: str, title: str) -> str:
    rows = []
    head: list[str] = []
    for precision in ("fp32", "bf16"):
        by_name = series(found, key, precision)
        names = list(by_name)
        head = ["", title, *(f"{name}, s" for name in names), *(f"{n} / ReLU" for n in names[1:])]
        for x in sorted(by_name[names[0]]):
            seconds = [f"{by_name[name][x]['seconds']:.3f}" for name in names]
            ratios = [f"{by_name[name][x]['ratio']:.3f}" for name in names[1:]]
            rows.append([precision, str(x), *seconds, *ratios])
    return markdown([cell.replace("relu", "ReLU") for cell in head], rows)


def memory_tables(found: dict[str, dict[str, Any]]) -> str:
    rows = []
    names: list[str] = []
    for precision in ("fp32", "bf16"):
        by_t: dict[int, dict[str, dict[str, Any]]] = {}
        for row in found[f"memory-{precision}"]["rows"]:
            by_t.setdefault(row["timesteps"], {})[row["name"]] = row
        for timesteps, by_name in by_t.items():
            names = list(by_name)
            cells = [
                f"{row['after_forward_mib']:.1f} ({row['at_most_mib']:.1f})"
                for row in by_name.values()
            ]
            rows.append([precision, str(timesteps), *cells])
    return markdown(["", "T", *(name.replace("relu", "ReLU") for name in names)], rows)


def scaling_text(found: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name in ("scaling-1", "scaling-4"):
        result = found[name]
        alone, apart, together = result["rows"]
        rows.append(
            [
                f"{result['accumulation']} x {result['batch']}",
                f"{alone['seconds']:.3f}",
                f"{apart['seconds']:.3f}",
                f"{together['seconds']:.3f}",
                f"{apart['efficiency']:.3f}",
                f"{together['efficiency']:.3f}",
                f"{together['of_apart']:.3f}",
            ]
        )
    result = found["scaling-1"]
    count = result["processes"]
    head = [
        "micro-batches",
        "one process, s",
        f"{count} apart, s",
        f"{count} averaging, s",
        f"apart / {count} x one",
        f"averaging / {count} x one",
        "averaging / apart",
    ]
    return f"""{result["model"]}, {result["precision"]}, {result["engine"]}, whole steps with the
update, one core per process. Processes that do not communicate ("apart") show how much the machine
itself slows down when both cores are busy.

{markdown(head, rows)}

"The GPU path, computed" has an estimate for many GPUs."""


def data_text(result: dict[str, Any]) -> str:
    rows = [
        [
            row["name"],
            f"{row['images_per_s']:.0f}",
            f"{row['fastest']:.0f}",
            f"{row['of_torchvision']:.2f}",
            f"{row['of_dali']:.2f}",
            f"{row['of_decoding']:.2f}",
        ]
        for row in result["rows"]
    ]
    head = ["", "images/s", "fastest round", "/ torchvision", "/ DALI's reader", "/ decoding alone"]
    wait = result["wait"]
    used = ", ".join(f"{value:.0f}" for value in result["memory_mib"])
    source = Path(result["data"]).name if result["data"] else "the benchmark's own making"
    return f"""JPEGs of {source}, repeated as often as needed:
RandomResizedCrop to {result["size"]} pixels, flip, normalisation, batches of {result["batch"]};
{result["threads"]} threads, or {result["threads"]} workers of torchvision's DataLoader. "DALI's
reader" is a pipeline only of DALI's operators, beginning with its file reader. "decoding alone"
stops after its decoder, which decodes only the crop windows.

{markdown(head, rows)}

A training step of {wait["model"]} (batch {wait["batch"]}, {wait["precision"]}) on the same cores
takes {wait["step_s"]:.2f} s, of which it waits {wait["wait_percent"]:.2f} % for its images.

MiB of the process after each of {len(result["memory_mib"])} epochs of {result["images"]} images:
{used}."""


# --- as plots -----------------------------------------------------------------------------------

# Okabe and Ito's colours, which most people can distinguish; they mean the same in every panel.
COLOURS = {
    "relu": "#767676",
    "tetdist, none": "#0072B2",
    "tetdist, blocks": "#009E73",
    "tetdist, timesteps": "#E69F00",
    "spikingjelly, eager": "#D55E00",
}
LABELS = {"relu": "ReLU network, T x batch", "tetdist, none": "tetdist"}


def draw(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> Path:
    """Draw two PNGs into a folder beside the report; the folder."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    folder = options.output.with_suffix("")
    folder.mkdir(exist_ok=True)

    def panels(rows: int) -> tuple[Any, Any]:
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
        figure = Figure(figsize=(10.4, 4.2 * rows), dpi=110, layout=layout)
        FigureCanvasAgg(figure)
        return figure, figure.subplots(rows, 2).flat

    def plot(axis: Any, name: str, xs: list[int], ys: list[float]) -> None:
        label = LABELS.get(name, name.replace("tetdist, ", "recompute: "))
        axis.plot(xs, ys, "o-", color=COLOURS[name], label=label, markersize=4)

    def finish(axis: Any, title: str, x: str, y: str, xs: tuple[int, ...]) -> None:
        axis.set_title(title)
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.set_xscale("log", base=2)
        axis.set_xticks(xs, [str(value) for value in xs])
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        low, high = axis.get_ylim()
        axis.yaxis.set_minor_formatter("{x:g}" if high < 50 * low else "")
        axis.tick_params(axis="y", which="minor", labelsize=7)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)

    network = found["step-fp32"]["model"]
    figure, axes = panels(2)
    for axis, precision in zip(axes[:2], ("fp32", "bf16"), strict=True):
        for name, by_x in series(found, "timesteps", precision).items():
            xs = sorted(by_x)
            plot(axis, name, xs, [by_x[x]["seconds"] for x in xs])
        batch = found["step-fp32"]["batch"]
        finish(
            axis, f"{network}, batch {batch}, {precision}", "T", "s a step", timesteps_of(options)
        )
    for axis, precision in zip(axes[2:], ("fp32", "bf16"), strict=True):
        by_name: dict[str, dict[int, float]] = {}
        for row in found[f"memory-{precision}"]["rows"]:
            values = by_name.setdefault(row["name"], {})
            values[row["timesteps"]] = row["at_most_mib"]
        for name, values in by_name.items():
            plot(axis, name, sorted(values), [values[t] for t in sorted(values)])
        finish(
            axis,
            f"{network}, {precision}",
            "T",
            "MiB an image, kept at most",
            timesteps_of(options),
        )
    figure.savefig(folder / "timesteps.png")

    figure, axes = panels(1)
    for axis, precision in zip(axes, ("fp32", "bf16"), strict=True):
        for name, by_x in series(found, "batch", precision).items():
            xs = sorted(by_x)
            plot(axis, name, xs, [by_x[x]["images_per_s"] for x in xs])
        finish(
            axis,
            f"{network}, T=4, {precision}",
            "batch",
            "images/s (of T timesteps each)",
            batches_of(options),
        )
    figure.savefig(folder / "batch.png")
    return folder


if __name__ == "__main__":
    sys.exit(main())
