"""Check a machine with GPUs before training on it: versions, results, speed; some ten minutes.

    python tools/check_gpu.py --json gpu.json               one GPU
    torchrun --nproc-per-node 8 tools/check_gpu.py          all of a node, and what connects them

The exit status is 1 if there is something to mend, and the last line says what.
docs/make/performance.py takes the JSON file with --gpu. With --device cpu the same checks run in a
minute or two on small networks, and show that they work.
"""

import argparse
from pathlib import Path

from tetdist.cli.common import answer, program
from tetdist.errors import UserError
from tetdist.files import write_json

# Those of device_check/checks.py, which is slow to import.
NAMES = (
    "versions",
    "numerics",
    "steps",
    "graphs",
    "links",
    "pixels",
    "resume",
    "rates",
    "loading",
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program("check_gpu"), description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--only", metavar=",".join(NAMES), help="some of the checks; default: all of them"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there, too")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.only = options.only.split(",") if options.only else NAMES
    if unknown := [name for name in options.only if name not in NAMES]:
        parser.error(f"--only: {unknown[0]!r} is none of {', '.join(NAMES)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return answer(lambda: check(options))


def check(options: argparse.Namespace) -> int:
    """Run the checks; the exit status.

    Raises:
        UserError: The file cannot be written, or torch does not see a GPU that is there.
    """
    from tetdist.device_check import check as checking
    from tetdist.device_check.checks import CHECKS
    from tetdist.distributed.world import join

    if options.json and not options.json.parent.is_dir():
        raise UserError(f"--json: there is no folder {options.json.parent}")
    with join(options.device) as world:
        small = world.device.type == "cpu"
        if small and world.rank == 0:
            print("no GPU: the checks run small, on the CPU, and their figures mean nothing")
        checks = {name: CHECKS[name] for name in NAMES if name in options.only}
        with checking.on(world, small=small) as here:
            report = checking.run_checks(checks, here, lambda line: print(line, flush=True))
        if world.rank == 0:
            print(f"\n{report.conclusion()}")
            if options.json:
                write_json(options.json, report.as_dict())
    return 1 if report.bad else 0
