"""Makes docs/results/landscape_DATA.md, .json and .png, with DATA digits or cifar10.

    python tools/study.py tet_vs_sdt_DATA --jobs 2 --only sdt_t4 --only tet_t4
    python docs/make/landscapes.py DATA

`--measured FILE.json` takes the numbers of an earlier tools/landscape.py instead.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import pages

from tetdist.apps.cli import landscape
from tetdist.apps.studies.numbers import Difference, detectable, holm
from tetdist.tables import markdown

DATA = {"digits": "handwritten digits", "cifar10": "5,000 images of CIFAR-10"}
KEYS = {
    "rise": "rise at half a filter's norm",
    "curvature": "curvature",
    "worst_rise": "largest rise found",
    "eigenvalue": "eigenvalue, lower bound",
}
HEAD = ["loss", "measure", "SDT", "TET", "TET - SDT", "minimum detectable effect", "p, Holm"]
TEXT = """The paper claims so in its abstract and shows a landscape.

![Loss along filter-normalised directions](landscape_{data}.png)

{table}

*SDT* and *TET* are means of {n} networks each: {samples:,} training samples, {directions} random
directions that move every filter by up to half its norm, running statistics recomputed at every
point ([how](../evaluation.md#measure-sharpness)). `time_mean` is L_SDT and `per_timestep` is L_TET
without its regulariser, both for all networks. Differences are paired by seed, with 95 % intervals;
p is corrected by Holm's method for the {tests} rows. The minimum detectable effect is for a power
of 80 %, uncorrected. Spikes jump, so no number is an upper bound. Bands are one standard deviation
over directions and networks. Contours are those of the first seed, in the plane of two random
directions.

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
        study, figure = Path(f"runs/tet_vs_sdt_{options.data}"), page.with_suffix(".png")
        runs = [str(study / f"{loss}_t4-seed{k}") for loss in ("sdt", "tet") for k in range(5)]
        given = ["--directions", "5", "--grid", "11", "--threads", "1"]
        given += ["--json", str(measured), "--output", str(figure)]
        os.chdir(pages.ROOT)  # The JSON file has the paths of the runs.
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
    of_path = {network["checkpoint"]: network["sharpness"] for network in found["networks"]}

    def average(paths: Iterable[str], loss: str, key: str) -> str:
        return f"{mean(of_path[path][loss][key] for path in paths):.3g}"

    for (loss, key), one in compared.items():
        low, high = sorted((sign * one["low"], sign * one["high"]))
        size, p = sign * one["mean"], corrected[loss, key]
        text = f"{size:+.2g} [{low:+.2g}, {high:+.2g}]"
        values = [average(found["groups"][f"{k}_t4"], loss, key) for k in ("sdt", "tet")]
        effect = f"{detectable(Difference(**one)):.2g}"
        rows.append([f"`{loss}`", KEYS[key], *values, text, effect, f"{p:.2g}"])
        flatter.append("flatter" if p < 0.05 and size < 0 else "sharper" if p < 0.05 else "")
    n = Difference(**next(iter(compared.values()))).n
    answer = (
        f"Of {len(rows)} measures, TET is significantly flatter by {flatter.count('flatter')} and "
        f"sharper by {flatter.count('sharper')} after Holm's correction. The rise of L_SDT along "
        f"random directions, TET minus SDT, is {rows[0][4]}."
    )
    where = f"{DATA[options.data]} at T=4"
    about = {
        "title": f"Sharpness of minima with TET and SDT on {where}",
        "question": f"Does TET end in flatter minima than SDT, on {where}?",
    }
    text = TEXT.format(
        data=options.data,
        table=markdown(HEAD, rows, numbers=True),
        n=n,
        samples=found["networks"][0]["samples"],
        directions=found["directions"],
        tests=len(rows),
    )
    pages.write(page, about, answer, n, found, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
