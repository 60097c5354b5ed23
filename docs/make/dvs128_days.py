"""Cuts recordings of five objects into pieces, of one day for training and another for tests.

    git clone https://github.com/eberlawrence/DVS128_BioLab    # the study used 40a66990
    python docs/make/dvs128_days.py DVS128_BioLab recordings
    python tools/prebin_dvs.py recordings data/dvs128_days --timesteps 10 --size 48

Each piece is 200 ms of a recording in a separate file: train/CLASS/*.aedat from one day,
test/CLASS/*.aedat from the other.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

CLASSES = {
    "box": "Caixa",
    "mug": "Caneca",
    "cutter": "Estilete",
    "pencil": "Lapiseira",
    "scissors": "Tesoura",
}
DAYS = {"train": "DataSet2", "test": "NeuromorphicObjectDataSet_100/aedatFiles"}
PIECE = 200_000  # microseconds


def cut(recording: Path, folder: Path) -> int:
    """Write the complete pieces of a recording, and return their number.

    Args:
        recording: An AEDAT 2.0 file: lines that begin with #, then pairs of address and
            microseconds, big-endian.
        folder: Folder for the pieces, numbered in order of time.
    """
    content = recording.read_bytes()
    begin = 0
    while content[begin : begin + 1] == b"#":
        begin = content.index(b"\n", begin) + 1
    events = np.frombuffer(content[begin : begin + (len(content) - begin) // 8 * 8], dtype=">u4")
    events = events.reshape(-1, 2)
    number = (events[:, 1] - events[0, 1]) // PIECE
    folder.mkdir(parents=True)
    pieces = int(number.max())  # The last one is shorter.
    for i in range(pieces):
        head = b"#!AER-DAT2.0\r\n"
        (folder / f"{i:03d}.aedat").write_bytes(head + events[number == i].tobytes())
    return pieces


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="a checkout of DVS128_BioLab")
    parser.add_argument("dest", type=Path, help="folder to make")
    options = parser.parse_args()
    if options.dest.exists():
        parser.error(f"{options.dest} exists already; remove it, or choose another folder")
    for part, day in DAYS.items():
        for name, file in CLASSES.items():
            recording = options.source / day / f"{file}.aedat"
            if not recording.is_file():
                parser.error(f"there is no {recording}; give a checkout of DVS128_BioLab as SOURCE")
            pieces = cut(recording, options.dest / part / name)
            print(f"{part}/{name}: {pieces} pieces of {recording}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
