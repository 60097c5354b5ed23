"""Stream a recording through a trained network, frame by frame.

    python tools/replay.py runs/live recording.aedat4
    python tools/replay.py runs/live recording.npz --fast --output recording.gif

The network must be trained on windows of a fixed size (tools/prebin_dvs.py --bins 20ms). After each
window the class and its confidence so far are printed; after T windows the network starts anew.
"""

import argparse
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetdist.apps.cli.common import add_checkpoint, documented_parser, run_command
from tetdist.apps.events.binning import binning_of, window_frames
from tetdist.apps.events.formats import read_recording
from tetdist.apps.events.recording import BadRecording, OtherSize, Sensor
from tetdist.config.flags import add_import
from tetdist.errors import UserError, typed
from tetdist.plugins import import_files
from tetdist.storage import hub
from tetdist.storage.files import check_writable, open_file
from tetdist.wording import counted, meant_path

if TYPE_CHECKING:
    from tetdist.apps.reports.replay_gif import ReplayGif
    from tetdist.models.base import SpikingNetwork


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = documented_parser("replay", __doc__)
    add = parser.add_argument
    add_checkpoint(parser)
    add("recording", metavar="RECORDING", type=Path, help="a file of events (docs/events.md)")
    add("--best", action="store_true", help="use a run folder's best checkpoint")
    add("--fast", action="store_true", help="replay as fast as possible, not in real time")
    add("--output", metavar="GIF", type=Path, help="draw the frames and probabilities")
    add_import(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_command(lambda: replay(options), interrupted="stopped")


def replay(options: argparse.Namespace) -> None:
    """Read, bin, stream and print."""
    if (file := options.recording).is_dir() or str(file).startswith(hub.NAMED):
        raise UserError(f"RECORDING: {file} is no file; give the network, then a file of events")
    hub.check_source(options.checkpoint)  # before torch is imported
    if not file.is_file():
        raise UserError(f"there is no recording {file}; {meant_path(file, 'correct its name')}")
    if output := options.output:
        if output.suffix.lower() != ".gif":
            raise UserError(f"--output: {output} must end in .gif")
        check_writable("--output", output)
    from tetdist.apps.reports.replay_gif import ReplayGif
    from tetdist.apps.weights.trained import load

    import_files(options.imports)
    trained = load(options.checkpoint, "best" if options.best else "last")
    binning, sensor = binning_of(trained.description.binning, options.checkpoint)
    classes = list(trained.description.classes or [])
    classes += [f"class {k}" for k in range(len(classes), trained.model.num_classes)]
    gif = ReplayGif(output, classes) if output else None
    try:
        with open_file(file) as stream:
            events = read_recording(file, stream.read(), sensor)
    except OtherSize as error:
        raise UserError(
            f"{file}: {error}; the network was trained for a {sensor} sensor, so replay a "
            f"recording of one, or train on recordings of this one ({typed('prebin_dvs')} --sensor)"
        ) from error
    except BadRecording as error:
        raise UserError(f"{file}: {error}") from error
    try:
        frames = window_frames(events, binning)
        run(trained.model, binning.size or sensor, classes, frames, gif, fast=options.fast)
    finally:
        if gif:
            gif.save()


def run(
    model: "SpikingNetwork",
    size: "Sensor",
    classes: list[str],
    frames: "Iterator[tuple[int, Any]]",
    gif: "ReplayGif | None",
    *,
    fast: bool,
) -> None:
    """Stream the frames, print a line for each, and a summary, also after Ctrl-C."""
    import numpy as np
    import torch

    from tetdist.models.streaming import stream_of

    stream = stream_of(model)
    model.set_execution("fused")
    terminal, late, shown, answer = sys.stdout.isatty(), 0, "", ""
    stream.step(torch.zeros(1, 2, size.height, size.width))  # Warm-up: it builds kernels.
    stream.reset()
    started, finished, spent = time.monotonic(), 0.0, array("d")
    try:
        for end, frame in frames:
            due = started + end / 1e6
            late += finished > due  # The result of the frame before.
            if not fast:
                time.sleep(max(0, due - time.monotonic()))
            begun = time.monotonic()
            if stream.timesteps == model.timesteps:
                stream.reset()
            probabilities = stream.step(torch.from_numpy(frame).float()[None]).softmax(-1)[0]
            confidence, number = probabilities.max(-1)
            finished = time.monotonic()
            spent.append(1e3 * (finished - begun))
            result = f"{classes[int(number)]}  {100 * float(confidence):.1f} %"
            at = f"timestep {stream.timesteps}/{model.timesteps}"
            line = f"{end / 1e6:8.3f} s  {at}  {result}  {spent[-1]:.2f} ms"
            if len(spent) <= model.timesteps or stream.timesteps == model.timesteps:
                answer = f"answer at {end / 1e6:.3f} s, {at}: {result}"
            # In a terminal, each line overwrites the last one, but no answer after T windows.
            whole = not terminal or stream.timesteps == model.timesteps
            print(f"\r{line:{len(shown)}}" if terminal else line, end="\n" * whole, flush=True)
            shown = "" if whole else line
            if gif:
                gif.add(end / 1e6, frame, probabilities.numpy(), stream.timesteps == 1)
    finally:
        if spent:
            middle, most = np.percentile(spent, [50, 99])
            lateness = "" if fast else f"; {late} late, after the next was due"
            times = f"{middle:.2f} ms (p50), {most:.2f} ms (p99)"
            print("\n" * bool(shown) + f"{counted(len(spent), 'frame')}: {times}{lateness}")
            print(answer)
