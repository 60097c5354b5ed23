"""Stream events through a trained network, frame by frame, as they come.

    python tools/replay.py recording.aedat4 --checkpoint runs/live
    python tools/replay.py recording.npz --checkpoint runs/live --fast --output recording.gif
    python tools/replay.py growing.raw --checkpoint runs/live --follow
    camera | python tools/replay.py - --format raw --checkpoint runs/live

The network must be trained on windows of a fixed size (tools/prebin_dvs.py --bins 20ms). After each
window the class and its confidence so far are printed; after T windows the network starts anew.
Ctrl-C ends the replay.
"""

import argparse
import select
import signal
import sys
import time
from array import array
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetdist.apps.cli.common import CHECKPOINT, documented_parser, run_command
from tetdist.config.flags import add_import
from tetdist.errors import UserError, typed
from tetdist.wording import counted

if TYPE_CHECKING:
    from tetdist.apps.events.recording import Sensor
    from tetdist.apps.reports.replay_gif import ReplayGif
    from tetdist.models.base import SpikingNetwork

_PIECE = 2**14  # most bytes read at once
_PAUSE = 0.01  # seconds between looks at a file that may grow, and at Ctrl-C


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = documented_parser("replay", __doc__)
    add = parser.add_argument
    recording = "a file of events (docs/events.md), or - for standard input"
    add("recording", metavar="RECORDING", type=Path, help=recording)
    add("--checkpoint", metavar="RUN_OR_FILE", type=Path, required=True, help=CHECKPOINT)
    add("--best", action="store_true", help="use a run folder's best checkpoint")
    add("--fast", action="store_true", help="replay as fast as possible, not in real time")
    add("--follow", action="store_true", help="wait for what is appended, until Ctrl-C")
    add("--format", metavar="SUFFIX", help="format of the events; default: the file's suffix")
    add("--output", metavar="GIF", type=Path, help="draw the frames and probabilities")
    add_import(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_command(lambda: replay(options), interrupted="stopped")


def replay(options: argparse.Namespace) -> None:
    """Read, bin, stream and print."""
    from tetdist.apps.events.binning import binning_of, window_frames
    from tetdist.apps.events.formats import SUFFIXES, stream_recording
    from tetdist.apps.events.formats.arrays import DECODERS as WHOLE
    from tetdist.apps.events.recording import BadEnd, Contents, OtherSize
    from tetdist.apps.reports.replay_gif import ReplayGif
    from tetdist.apps.weights.trained import load
    from tetdist.distributed.signals import handling
    from tetdist.plugins import import_files

    is_stdin = str(options.recording) == "-"
    name = "standard input" if is_stdin else str(options.recording)
    suffix = f".{options.format}" if options.format else options.recording.suffix.lower()
    if suffix not in SUFFIXES:
        known = ", ".join(known.removeprefix(".") for known in SUFFIXES)
        raise UserError(f"{name} has no known format; name it with --format, one of {known}")
    if suffix in WHOLE and (is_stdin or options.follow):
        raise UserError(
            f"{suffix} cannot be read before it is complete; give a finished file, without --follow"
        )
    import_files(options.imports)
    trained = load(options.checkpoint, "best" if options.best else "last")
    binning, sensor = binning_of(trained.description.binning, options.checkpoint)
    classes = list(trained.description.classes or [])
    classes += [f"class {k}" for k in range(len(classes), trained.model.num_classes)]
    gif = ReplayGif(options.output, classes) if options.output else None
    ctrl_c = CtrlC()
    contents = Contents(pieces(options.recording, ctrl_c, follow=options.follow))
    frames = window_frames(stream_recording(suffix, contents, sensor), binning)
    with handling([signal.SIGINT], ctrl_c.press):
        size = binning.size or sensor
        used = run(trained.model, size, classes, frames, ctrl_c, gif, fast=options.fast)
    if gif and used:
        gif.save()
    if (bad := contents.bad_end) is None or ctrl_c.is_early:
        return
    text = f"{name}: {bad}" + "; everything before it was used" * used
    if isinstance(bad, OtherSize):
        text += (
            f"; the network was trained for a {sensor} sensor, so replay a recording of one, or "
            f"train on recordings of this one ({typed('prebin_dvs')} --sensor)"
        )
    if not (used and isinstance(bad, BadEnd)):
        raise UserError(text) from bad
    print(text, file=sys.stderr)


class CtrlC:
    """Ctrl-C, which ends the replay after what was read; a second one interrupts at once.

    Attributes:
        is_early: True if there was more to read.
    """

    is_pressed = is_early = False

    def press(self, *_: object) -> None:
        if self.is_pressed:
            raise KeyboardInterrupt
        self.is_pressed = True


def pieces(path: Path, ctrl_c: CtrlC, *, follow: bool) -> Iterator[bytes]:
    """Yield a file's contents as they come, until they end or Ctrl-C was pressed.

    Raises:
        BadRecording: The file cannot be read.
    """
    from tetdist.apps.events.recording import BadRecording

    is_stdin = str(path) == "-"
    try:
        with FileIO(0 if is_stdin else path, closefd=not is_stdin) as file:
            while not ctrl_c.is_pressed:
                if not select.select([file], [], [], _PAUSE)[0]:
                    continue
                if data := file.read(_PIECE):
                    yield data
                elif not follow:
                    return
                else:
                    time.sleep(_PAUSE)
            ctrl_c.is_early = bool(select.select([file], [], [], 0)[0] and file.read(1))
    except OSError as error:
        raise BadRecording(f"it cannot be read ({error.strerror})") from error


def run(
    model: "SpikingNetwork",
    size: "Sensor",
    classes: list[str],
    frames: "Iterator[tuple[int, Any]]",
    ctrl_c: CtrlC,
    gif: "ReplayGif | None",
    *,
    fast: bool,
) -> bool:
    """Stream the frames, print a line for each, and a summary; return whether there are any."""
    import numpy as np
    import torch

    from tetdist.models.streaming import stream_of

    stream = stream_of(model)
    model.set_execution("fused")
    terminal, late, shown = sys.stdout.isatty(), 0, ""
    stream.step(torch.zeros(1, 2, size.height, size.width))  # Warm-up: it builds kernels.
    stream.reset()
    started, finished, spent = time.monotonic(), 0.0, array("d")
    try:
        for end, frame in frames:
            if ctrl_c.is_early:
                break
            if not spent:  # A live recording starts when its first events come.
                started = max(started, time.monotonic() - end / 1e6)
            due = started + end / 1e6
            late += finished > due  # The result of the frame before.
            while not (fast or ctrl_c.is_pressed) and (wait := due - time.monotonic()) > 0:
                time.sleep(min(wait, _PAUSE))
            begun = time.monotonic()
            if stream.timesteps == model.timesteps:
                stream.reset()
            probabilities = stream.step(torch.from_numpy(frame).float()[None]).softmax(-1)[0]
            confidence, number = probabilities.max(-1)
            finished = time.monotonic()
            spent.append(1e3 * (finished - begun))
            line = (
                f"{end / 1e6:8.3f} s  timestep {stream.timesteps}/{model.timesteps}  "
                f"{classes[int(number)]}  {100 * float(confidence):.1f} %  {spent[-1]:.2f} ms"
            )
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
            part = f"; the last answer is of {stream.timesteps} of {model.timesteps} timesteps"
            part *= stream.timesteps < model.timesteps
            print("\n" * bool(shown) + f"{counted(len(spent), 'frame')}: {times}{lateness}{part}")
    return bool(spent)
