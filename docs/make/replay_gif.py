"""Draws docs/replay.gif: a network's answers to handwritten digits before a simulated event camera.

    python tools/digits.py data/digits
    python docs/make/replay_gif.py
    python docs/make/replay_gif.py data/digits/val/8/4000.png --checkpoint runs/live --output 8.gif

Each image moves before the camera for the network's T windows. By default, these are digits of
which the network that comes with tetdist becomes surer as events come.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from tetdist.apps.cli import replay
from tetdist.apps.cli.common import run_command
from tetdist.apps.events.binning import Window, binning_of
from tetdist.apps.events.simulate import Simulation, simulate
from tetdist.apps.weights.trained import load

PROJECT = Path(__file__).parents[2]
DIGITS = ("4/2037", "2/1055", "3/1520", "5/2521")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    images = [PROJECT / f"data/digits/val/{digit}.png" for digit in DIGITS]
    add("images", nargs="*", type=Path, metavar="IMAGE", default=images)
    network = Path("tetdist:simulated_digits")
    add("--checkpoint", metavar="RUN_OR_FILE", type=Path, default=network)
    add("--output", type=Path, metavar="GIF", default=PROJECT / "docs/replay.gif")
    options = parser.parse_args()
    return run_command(lambda: draw(options))


def draw(options: argparse.Namespace) -> int:
    description = load(options.checkpoint).description
    binning, sensor = binning_of(description.binning, options.checkpoint)
    window = Window.of(binning.bins)
    assert window is not None
    span, end, parts = binning.timesteps * window.size, 0, []
    for image in options.images:
        # The noise is that of the data set's recording.
        path = "/".join(image.parts[-3:])
        events = simulate(image.read_bytes(), path, Simulation(*sensor, seed=0))
        elapsed = events.t - events.t[0]
        kept = elapsed < span if window.unit == "us" else np.arange(len(events)) < span
        parts.append(np.stack([events.x, events.y, elapsed + end, events.p])[:, kept])
        end += span if window.unit == "us" else int(elapsed[kept][-1]) + 1
    columns = dict(zip("xytp", np.concatenate(parts, 1), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        recording = str(Path(folder) / "digits.npz")
        np.savez(recording, **columns, **sensor._asdict())
        command = [recording, "--checkpoint", str(options.checkpoint), "--fast"]
        return replay.main([*command, "--output", str(options.output)])


if __name__ == "__main__":
    sys.exit(main())
