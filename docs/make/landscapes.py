"""Makes docs/results/landscape_digits.md, .json and .png from the runs of tet_vs_sdt_digits.

    python tools/study.py tet_vs_sdt_digits --jobs 2 --only sdt_t4 --only tet_t4
    python docs/make/landscapes.py

`--measured FILE.json` takes the numbers of an earlier tools/landscape.py instead.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tetdist.apps.cli import landscape
from tetdist.apps.studies.numbers import Difference, holm, signed
from tetdist.storage.files import write_json
from tetdist.tables import markdown

ROOT = Path(__file__).resolve().parents[2]

PAGE = ROOT / "docs/results/landscape_digits.md"
QUESTION = "Does TET end in flatter minima than SDT, on handwritten digits at T=4?"
KEYS = {
    "rise": "rise at half a filter's norm",
    "curvature": "curvature",
    "worst_rise": "largest rise found",
    "eigenvalue": "eigenvalue, lower bound",
}
TEXT = """# Sharpness of minima with TET and SDT on handwritten digits

**Question.** {question} The paper claims that it does.

**Answer.** {answer}

![Loss along filter-normalised directions](landscape_digits.png)

{table}

Means of {n} networks each, {samples:,} training samples, {directions} random directions that move
every filter by up to half its norm, running statistics recomputed at every point
([how](../evaluation.md#measure-sharpness)). `time_mean` is L_SDT and `per_timestep` is L_TET
without its regulariser, both for all networks. Differences are paired by seed, with 95 %
intervals; p is corrected by Holm's method for the {tests} rows. Spikes jump, so no number is an
upper bound.

Commands: `python tools/study.py tet_vs_sdt_digits --jobs 2 --only sdt_t4 --only tet_t4` and
`python docs/make/landscapes.py`. Numbers: [landscape_digits.json](landscape_digits.json).
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--measured", type=Path)
    options = parser.parse_args()
    measured = options.measured or PAGE.with_suffix(".json")
    if options.measured is None:
        runs, figure = ROOT / "runs/tet_vs_sdt_digits", str(PAGE.with_suffix(".png"))
        given = ["--directions", "5", "--json", str(measured), "--output", figure]
        if code := landscape.main([str(runs), *given]):
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
    study = {"title": "Sharpness of minima on digits", "question": QUESTION}
    write_json(PAGE.with_suffix(".json"), found | {"study": study, "answer": answer, "n": n})
    table = markdown(["loss", "measure", "TET - SDT", "p, Holm"], rows, numbers=True)
    text = TEXT.format(
        question=QUESTION,
        answer=answer,
        table=table,
        n=n,
        samples=found["networks"][0]["samples"],
        directions=found["directions"],
        tests=len(rows),
    )
    PAGE.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
