"""Renew constraints.txt: the newest versions that pyproject.toml allows, as pip resolves them.

    python docs/make/constraints.py       (or `make constraints`)

pip downloads the metadata of all packages, and installs nothing.
"""

import json
import platform
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
# Of the two builds of DALI, the tests use the other; Triton comes with torch for CUDA.
EXTRAS_LEFT_OUT = ("cuda120", "gpu-code")
HEADER = """\
# The newest versions that pyproject.toml and pip's settings allow, by `make constraints` on {date}
# with Python {python}, without what a version of CUDA brings (triton, nvidia-*, but DALI).
# .ci/run tests these versions; `-c constraints.txt` installs them.
"""


def pins(packages: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield ``name==version`` for the packages of pip's report, except those left out."""
    for package in packages:
        name, version = package["metadata"]["name"], package["metadata"]["version"]
        of_cuda = name.startswith(("nvidia-", "cuda-", "triton"))
        of_cuda &= not name.startswith(("nvidia-dali-", "nvidia-ml-py"))
        if not of_cuda and name not in ("tetdist", "setuptools", "wheel"):
            yield f"{name}=={version.partition('+')[0]}"


def main() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    extras = [name for name in project["optional-dependencies"] if name not in EXTRAS_LEFT_OUT]
    resolve = ("install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-")
    command = [sys.executable, "-m", "pip", *resolve, f"{PROJECT}[{','.join(extras)}]"]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    python = ".".join(platform.python_version_tuple()[:2])
    lines = sorted(pins(report["install"]), key=lambda line: line.partition("==")[0].lower())
    header = HEADER.format(date=time.strftime("%-d %B %Y"), python=python)
    (PROJECT / "constraints.txt").write_text(header + "\n".join(lines) + "\n")
    print(f"wrote constraints.txt: {len(lines)} packages")


if __name__ == "__main__":
    main()
