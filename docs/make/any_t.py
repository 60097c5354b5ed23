"""Makes docs/results/any_t.md, .json and .png from the numbers of three studies' pages.

python docs/make/any_t.py

Accuracies with running statistics recomputed at each T are those of any_t.json, which was made by
commit d1ca4e46, the last one that recomputes them.
"""

import json
import re
import sys
from functools import cache
from statistics import mean, median
from typing import Any

import numpy as np
import pages

from tetdist.apps.reports import style
from tetdist.apps.studies.numbers import (
    Difference,
    detectable,
    exit_timesteps,
    exit_top1,
    holm,
    paired_difference,
    spread,
)
from tetdist.tables import markdown

PAGE = pages.RESULTS / "any_t.md"
# Study: data, the T that are compared.
STUDIES = {
    "any_t_cifar10": ("CIFAR-10, 10,000 images", (1, 2, 4)),
    "any_t_nmnist": ("N-MNIST", (1, 2, 4, 10)),
    "any_t_days": ("objects, another day", (1, 2, 4, 10)),
}


@cache
def recomputed(study: str) -> dict[str, Any]:
    """Return top-1 by entry and T with running statistics recomputed at that T."""
    entries = json.loads(PAGE.with_suffix(".json").read_text())["studies"][study]["entries"]
    return {entry: one["recomputed"] for entry, one in entries.items()}


def trained_at(entry: str) -> int | None:
    """Return the T that an entry's name has: that of its training. The others serve every T."""
    number = re.search(r"(?:^|_)t(\d+)$", entry)
    return int(number[1]) if number else None


def numbers_of(study: str) -> dict[str, Any]:
    """Return the numbers of each entry of a study."""
    data, compared = STUDIES[study]
    entries, of_study = {}, pages.numbers_of(pages.RESULTS / f"{study}.json")
    for entry in of_study.entries:
        most, results = max(compared), of_study.of(entry)
        entries[entry] = {
            "seeds": [one.seed for one in results],
            "image_timesteps": median(one.image_timesteps for one in results),
            "seconds": min(one.seconds for one in results),
            "top1": {t: [one.by_timestep[t - 1] for one in results] for t in compared},
            "recomputed": recomputed(study)[entry],
            "exit_top1": [exit_top1(one) for one in results],
            "exit_timesteps": [exit_timesteps(one) for one in results],
            "exit_curve": pages.mean_exit_curve(results, most).tolist(),
        }
    return {"data": data, "entries": entries, "minus_own": differences(entries, compared)}


def differences(entries: dict[str, Any], compared: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return networks of drawn T, and of the largest T, minus those trained at a T, at that T."""
    changes = []
    for entry, one in entries.items():
        loss, trained = entry.partition("_")[0], trained_at(entry)
        for t in compared if trained in (None, max(compared)) else ():
            own = "t1" if t == 1 else f"{loss}_t{t}"
            if own in entries and t != trained:
                pair = (one["top1"][t], entries[own]["top1"][t])
                changes.append({"entry": entry, "t": t} | vars(paired_difference(*pair)))
    return changes


def difference(one: dict[str, Any]) -> Difference:
    return Difference(**{key: one[key] for key in ("n", "mean", "low", "high", "p")})


def own_table(studies: dict[str, Any]) -> str:
    rows = []
    for values in studies.values():
        for one in values["minus_own"]:
            row = [values["data"], f"`{one['entry']}`", str(one["t"]), str(difference(one))]
            row += [f"{detectable(difference(one)):.2f}"]
            rows.append([*row, f"{one['p']:.2g}", f"{one['holm']:.2g}"])
    head = ["data", "training", "T", "difference", "minimum detectable effect", "p", "p, Holm"]
    return markdown(head, rows, numbers=True)


def accuracy_table(studies: dict[str, Any]) -> str:
    head = ["data, training", "image-timesteps, millions", "s", "T=1", "T=2", "T=4", "T=10"]
    rows = []
    for values in studies.values():
        for entry, one in values["entries"].items():
            cells = {t: str(spread(top1)) for t, top1 in one["top1"].items()}
            row = [f"{values['data']}, `{entry}`", f"{one['image_timesteps'] / 1e6:.3f}"]
            row += [f"{one['seconds']:.0f}", *(cells.get(t, "") for t in (1, 2, 4, 10))]
            row += [f"{mean(one['exit_top1']):.2f} at {mean(one['exit_timesteps']):.2f}"]
            rows.append(row)
    return markdown([*head, "early exit: top-1 at mean T"], rows, numbers=True)


def recomputed_table(studies: dict[str, Any]) -> str:
    rows = []
    for values in studies.values():
        for entry, one in ((k, v) for k, v in values["entries"].items() if v["recomputed"]):
            changes = {
                int(t): str(paired_difference(after, one["top1"][int(t)]))
                for t, after in one["recomputed"].items()
            }
            rows.append(
                [f"{values['data']}, `{entry}`", *(changes.get(t, "") for t in (1, 2, 4, 10))]
            )
    return markdown(["data, training", "T=1", "T=2", "T=4", "T=10"], rows, numbers=True)


def draw(studies: dict[str, Any]) -> Any:
    figure = style.new_figure(14, 4.8)
    for axis, (study, values) in zip(figure.subplots(1, 3), studies.items(), strict=True):
        entries, most = values["entries"], max(STUDIES[study][1])
        shown = {
            f"tet_t{most}": "TET",
            f"tet_1_to_{most}": "TET, T drawn",
            f"sdt_t{most}": "SDT",
            f"sdt_1_to_{most}": "SDT, T drawn",
            "tet_of_means": "TET of means",
        }
        for colour, (entry, label) in zip(style.SERIES, shown.items(), strict=False):
            result = entries[entry]
            axis.plot(*np.transpose(result["exit_curve"]), "o-", ms=3.5, color=colour, label=label)
            chosen = mean(result["exit_timesteps"]), mean(result["exit_top1"])
            axis.plot(*chosen, "D", ms=9, color=colour)
        for entry, one in entries.items():
            t = trained_at(entry)
            if t and t < most:
                colour = style.SERIES[0 if entry.startswith("t") else 2]
                axis.plot(t, mean(one["top1"][t]), "s", ms=8, mfc="none", mec=colour)
        axis.set_xlabel("mean timesteps of a sample")
        style.finish(axis, values["data"], style.ACCURACY, legend=False)
        axis.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def answer_of(studies: dict[str, Any]) -> str:
    all_of = [one for values in studies.values() for one in values["minus_own"]]
    changed, at_1 = {}, {}
    for loss in ("tet", "sdt"):
        of_loss = [one for one in all_of if one["entry"].startswith(loss)]
        better, worse = (
            sum(one["holm"] < 0.05 and sign * one["mean"] > 0 for one in of_loss)
            for sign in (1, -1)
        )
        changed[loss] = f"{better} of {len(of_loss)} are better and {worse} worse"
        not_drawn = [one for one in of_loss if one["t"] == 1 and trained_at(one["entry"])]
        at_1[loss] = ", ".join(str(difference(one)) for one in not_drawn)
    data = ", ".join(values["data"] for values in studies.values())
    drawn, costs = [], []
    for study, values in studies.items():
        most = max(STUDIES[study][1])
        own, largest = (values["entries"][f"tet_{kind}{most}"] for kind in ("1_to_", "t"))
        drawn.append(str(paired_difference(own["top1"][most], largest["top1"][most])))
        costs.append(100 * own["image_timesteps"] / largest["image_timesteps"])
    return (
        "One training at the largest T, tested at T=1, minus the training at T=1: with TET "
        f"{at_1['tet']} points ({data}), with SDT {at_1['sdt']}. TET with T drawn uniformly costs "
        f"{min(costs):.0f} to {max(costs):.0f} % of the image-timesteps of TET at the largest T, "
        f"and differs from it by {', '.join(drawn)} points at that T. Of the comparisons with the "
        f"training at the T of test, {changed['tet']} with TET, {changed['sdt']} with SDT after "
        f"Holm's correction for all {len(all_of)}."
    )


def main() -> int:
    pages.no_flags(__doc__)
    studies = {study: numbers_of(study) for study in STUDIES}
    all_of = [one for values in studies.values() for one in values["minus_own"]]
    for change, p in zip(all_of, holm([one["p"] for one in all_of]), strict=True):
        change["holm"] = p
    n = min(len(one["seeds"]) for values in studies.values() for one in values["entries"].values())
    tables = [own_table(studies), accuracy_table(studies), recomputed_table(studies)]
    pages.write(PAGE, answer_of(studies), n, {"studies": studies}, tables, draw(studies))
    return 0


if __name__ == "__main__":
    sys.exit(main())
