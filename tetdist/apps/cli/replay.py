"""Stream a recording of an event camera through a trained network, frame by frame.

    python tools/replay.py recording.aedat4 --checkpoint runs/live
    python tools/replay.py recording.npz --checkpoint runs/live --fast

The network must be trained on windows of a fixed size (tools/prebin_dvs.py --bins 20ms). After each
window the class and its confidence so far are printed; after T windows the network starts anew.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tetdist.apps.cli.common import program, run_command
from tetdist.config.flags import add_import
from tetdist.errors import UserError, typed
from tetdist.wording import counted

if TYPE_CHECKING:
    from tetdist.apps.events.binning import Binning
    from tetdist.apps.events.recording import Events, Sensor
    from tetdist.apps.weights.trained import Trained
    from tetdist.models.streaming import Stream


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program("replay"),
        description=(__doc__ or "").replace("python tools/replay.py", typed("replay")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    source = "run folder, checkpoint or export folder, .safetensors file, or tetdist:NAME"
    add("recording", metavar="RECORDING", type=Path, help="a file of events (docs/events.md)")
    add("--checkpoint", metavar="RUN_OR_FILE", type=Path, required=True, help=source)
    add("--best", action="store_true", help="use a run folder's best checkpoint")
    add("--fast", action="store_true", help="replay as fast as possible, not in real time")
    add_import(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_command(lambda: replay(options), interrupted="stopped")


def replay(options: argparse.Namespace) -> None:
    """Read, bin, stream and print.

    Raises:
        UserError: The recording or the network does not suit.
    """
    from tetdist.apps.weights.trained import load
    from tetdist.models.streaming import stream_of
    from tetdist.plugins import import_files

    import_files(options.imports)
    trained = load(options.checkpoint, "best" if options.best else "last")
    binning, sensor = binning_of(trained, options.checkpoint)
    events, stream = read(options.recording, sensor), stream_of(trained.model)
    side, size = trained.model.input_size, binning.size or events.sensor
    if side is not None and size != (side, side):
        raise UserError(
            f"{options.recording} has frames of {size} pixels, the network takes {side}x{side}; "
            "replay a recording of the camera that it was trained for"
        )
    late = run(stream, trained, events, binning, fast=options.fast)
    if late:
        print(f"{counted(late, 'frame')} late: computed after the next one was there")


def binning_of(trained: "Trained", path: Path) -> "tuple[Binning, Sensor | None]":
    """Return how the run's recordings were binned, and the sensor they are of.

    Raises:
        UserError: It is unknown, or is not by windows of a fixed size.
    """
    from tetdist.apps.events.binning import Binning, Window
    from tetdist.apps.events.recording import Sensor

    found = trained.description.binning
    if found is None:
        raise UserError(
            f"{path} was trained on images, or on recordings whose binning it does not know; "
            f"train on a folder that `{typed('prebin_dvs')} --bins 20ms` made"
        )
    if Window.of(found["bins"]) is None:
        raise UserError(
            f"{path} was trained on --bins {found['bins']}, T parts of a whole recording, which a "
            f"stream cannot know; bin by windows, `{typed('prebin_dvs')} --bins 20ms`, and train "
            "again"
        )

    def size(text: str | None) -> Sensor | None:
        return None if text is None else Sensor(*map(int, text.split("x")))

    keys = ("timesteps", "bins", "values", "resize", "dtype")
    binning = Binning(size=size(found["size"]), **{key: found[key] for key in keys})
    return binning, size(found["sensor"])


def read(path: Path, sensor: "Sensor | None") -> "Events":
    """Read a recording.

    Raises:
        UserError: It cannot be used.
    """
    from tetdist.apps.events.formats import read_recording
    from tetdist.apps.events.recording import BadRecording

    try:
        return read_recording(path, path.read_bytes(), sensor)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except BadRecording as error:
        raise UserError(f"{path}: {error}") from error


def run(
    stream: "Stream", trained: "Trained", events: "Events", binning: "Binning", *, fast: bool
) -> int:
    """Stream the windows, print a line for each; return how many came late."""
    import torch

    from tetdist.apps.events.binning import window_frames

    model = trained.model
    model.set_execution("fused")
    classes = trained.description.classes or []
    terminal, late, shown = sys.stdout.isatty(), 0, ""
    height, width = reversed(binning.size or events.sensor)
    stream.step(torch.zeros(1, 2, height, width))  # Warm-up: the first step builds kernels.
    stream.reset()
    first, started = int(events.t[0]), time.monotonic()
    for end, frame in window_frames(events, binning):
        if not fast:
            wait = started + (end - first) / 1e6 - time.monotonic()
            late += wait < 0  # The previous frame was not finished in time.
            time.sleep(max(0.0, wait))
        begun = time.perf_counter()
        if stream.timesteps == model.timesteps:
            stream.reset()
        mean = stream.step(torch.from_numpy(frame).float()[None])
        confidence, number = mean.softmax(-1)[0].max(-1)
        spent = time.perf_counter() - begun
        name = classes[int(number)] if int(number) < len(classes) else f"class {int(number)}"
        line = (
            f"{(end - first) / 1e6:8.3f} s  timestep {stream.timesteps}/{model.timesteps}  "
            f"{name}  {100 * float(confidence):.1f} %  {1e3 * spent:.2f} ms"
        )
        print(
            f"\r{line:{len(shown)}}" if terminal else line, end="" if terminal else "\n", flush=True
        )
        shown = line
    if terminal:
        print()
    return late
