"""Takes the steps of the Dockerfile in a bare root, where no Docker is at hand; as root.

    debootstrap --variant=minbase --components=main,universe noble /tmp/root
    python tests/dockerfile.py /tmp/root                       [--build-arg DALI=cuda120 ...]

The root is the base image without what NVIDIA adds to it: the CUDA runtime, which torch brings
with it, too, and variables for the container's driver. All else is downloaded, as Docker does:
8 GB of disk, ten minutes. In the end the image's command runs. The root stays, to be looked at and
removed. /proc and /dev are there for the steps alone, in a mount namespace of their own.

--env gives the steps variables that Docker's would not have, such as PIP_CERT behind a proxy.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[1]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Docker has all of these mounted for a step.
_MOUNTS = "mount -t proc proc {root}/proc && mount --rbind /dev {root}/dev"


class Step(NamedTuple):
    instruction: str
    text: str


@dataclass
class Image:
    """What the steps so far have left, beside files.

    Attributes:
        root: The folder of its files.
        arguments: Values of ARG.
        environment: Of ENV, and of what was given for all steps.
        folder: WORKDIR.
        command: Of CMD.
    """

    root: Path
    arguments: dict[str, str]
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    folder: str = "/"
    command: list[str] = field(default_factory=list)


def steps(text: str) -> Iterator[Step]:
    """The instructions of a Dockerfile, each a line as Docker makes it one."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", "", "\n".join(lines)).splitlines():
        if line.strip():
            yield Step(*line.split(maxsplit=1))


def take(step: Step, image: Image) -> None:
    """Take a step.

    Raises:
        ValueError: The instruction is none of those that this file knows.
        subprocess.CalledProcessError: A command failed.
    """
    match step.instruction:
        case "FROM":
            pass  # The root is there.
        case "ARG":
            name, _, default = step.text.partition("=")
            image.arguments.setdefault(name, default)
        case "ENV":
            values = dict(pair.split("=", 1) for pair in shlex.split(step.text))
            # Docker puts in what was there before the instruction.
            before = dict(image.environment)
            for name, value in values.items():
                image.environment[name] = re.sub(r"\$(\w+)", lambda m: before[m[1]], value)
        case "WORKDIR":
            image.folder = step.text
            _inside(image, image.folder).mkdir(parents=True, exist_ok=True)
        case "RUN":
            run(image, ["/bin/sh", "-c", step.text])
        case "COPY":
            *sources, target = step.text.split()
            copy(image, sources, target)
        case "CMD":
            image.command = json.loads(step.text)
        case other:
            raise ValueError(f"the Dockerfile has a {other}, which tests/dockerfile.py cannot do")


def run(image: Image, command: list[str]) -> None:
    """Run a command in the root."""
    root = shlex.quote(str(image.root))
    variables = [f"{k}={v}" for k, v in (image.arguments | image.environment).items()]
    inside = ["chroot", str(image.root), "/usr/bin/env", "-i", "HOME=/root", *variables]
    inside += ["/bin/sh", "-c", f'cd {shlex.quote(image.folder)} && exec "$@"', "sh", *command]
    script = f'{_MOUNTS.format(root=root)} && exec "$@"'
    alone = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    subprocess.run([*alone, "sh", "-c", script, "sh", *inside], check=True)


def copy(image: Image, sources: list[str], target: str) -> None:
    """Copy files of the project that git knows: the others are ignored, or ought to be."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *sources],
        cwd=PROJECT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.split("\0")[:-1]
    folder = _inside(image, str(Path(image.folder, target)))
    for name in listed:
        # What is copied by itself lies directly in the target, or has the name that is given.
        if sources == ["."]:
            to = folder / name
        else:
            to = folder / Path(name).name if target.endswith("/") else folder
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, to)


def _inside(image: Image, path: str) -> Path:
    return image.root / path.lstrip("/")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("root", type=Path, help="a folder that debootstrap has made")
    for flag in ("--build-arg", "--env"):
        parser.add_argument(flag, action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    image = Image(options.root.resolve(), dict(one.split("=", 1) for one in options.build_arg))
    image.environment |= dict(one.split("=", 1) for one in options.env)
    # Names are resolved as here.
    shutil.copy("/etc/resolv.conf", image.root / "etc" / "resolv.conf")
    for step in steps((PROJECT / "Dockerfile").read_text()):
        print(f"--- {step.instruction} {step.text}", flush=True)
        started = time.monotonic()
        take(step, image)
        print(f"    {time.monotonic() - started:.0f} s", flush=True)
    print(f"--- {shlex.join(image.command)}", flush=True)
    run(image, image.command)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"exit status {error.returncode}")
