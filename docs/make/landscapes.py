"""Makes docs/results/landscape_DATA.md, .json and .png, with DATA digits or cifar10.

    python tools/study.py tet_vs_sdt_DATA --jobs 2 --only sdt_t4 --only tet_t4
    python docs/make/landscapes.py DATA

`--measured FILE.json` takes the numbers of an earlier tools/landscape.py instead.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pages

from tetdist.apps.cli import landscape
from tetdist.apps.studies.numbers import Difference, holm, signed
from tetdist.tables import markdown

DATA = {"digits": "handwritten digits", "cifar10": "5,000 images of CIFAR-10"}
KEYS = {
    "rise": "rise at half a filter's norm",
    "curvature": "curvature",
    "worst_rise": "largest rise found",
    "eigenvalue": "eigenvalue, lower bound",
}
TEXT = """The paper claims that it does: its abstract, and its figure of the landscape.

![Loss along filter-normalised directions](landscape_{data}.png)

{table}

Means of {n} networks each, {samples:,} training samples, {directions} random directions that move
every filter by up to half its norm, running statistics recomputed at every point
([how](../evaluation.md#measure-sharpness)). `time_mean` is L_SDT and `per_timestep` is L_TET
without its regulariser, both for all networks. Differences are paired by seed, with 95 %
intervals; p is corrected by Holm's method for the {tests} rows. Spikes jump, so no number is an
upper bound. Contours are those of the first seed, in the plane of two random directions.

Commands: `python tools/study.py tet_vs_sdt_{data} --jobs 2 --only sdt_t4 --only tet_t4` and
`python docs/make/landscapes.py {data}`. Numbers: [landscape_{data}.json](landscape_{data}.json).
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", choices=DATA)
    parser.add_argument("--measured", type=Path)
    options = parser.parse_args()
    page = pages.RESULTS / f"landscape_{options.data}.md"
    measured = options.measured or page.with_suffix(".json")
    if options.measured is None:
        study, figure = pages.ROOT / f"runs/tet_vs_sdt_{options.data}", page.with_suffix(".png")
        runs = [str(study / f"{loss}_t4-seed{k}") for loss in ("sdt", "tet") for k in range(5)]
        given = ["--directions", "5", "--grid", "11", "--threads", "1"]
        given += ["--json", str(measured), "--output", str(figure)]
        if code := landscape.main([*runs, *given]):
            return code
    found: dict[str, Any] = json.loads(measured.read_text())
    ((name, by_loss),) = found["differences"].items()
    sign = 1 if name.startswith("tet") else -1  # The first group is the control.
    compared = {
        (loss, key): by_loss[loss][key] for loss in ("time_mean", "per_timestep") for key in KEYS
    }
    corrected = dict(zip(compared, holm([one["p"] for one in compared.values()]), strict=True))
    rows, flatter = [], []
    for (loss, key), one in compared.items():
        low, high = sorted((sign * one["low"], sign * one["high"]))
        mean, p = sign * one["mean"], corrected[loss, key]
        text = f"{signed(mean)} [{signed(low)}, {signed(high)}]"
        rows.append([f"`{loss}`", KEYS[key], text, f"{p:.2g}"])
        flatter.append("flatter" if p < 0.05 and mean < 0 else "sharper" if p < 0.05 else "")
    n = Difference(**next(iter(compared.values()))).n
    answer = (
        f"Of {len(rows)} measures, TET is significantly flatter by {flatter.count('flatter')} and "
        f"sharper by {flatter.count('sharper')} after Holm's correction. The rise of L_SDT along "
        f"random directions, TET minus SDT, is {rows[0][2]}."
    )
    where = f"{DATA[options.data]} at T=4"
    about = {
        "title": f"Sharpness of minima with TET and SDT on {where}",
        "question": f"Does TET end in flatter minima than SDT, on {where}?",
    }
    text = TEXT.format(
        data=options.data,
        table=markdown(["loss", "measure", "TET - SDT", "p, Holm"], rows, numbers=True),
        n=n,
        samples=found["networks"][0]["samples"],
        directions=found["directions"],
        tests=len(rows),
    )
    pages.write(page, about, answer, n, found, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
