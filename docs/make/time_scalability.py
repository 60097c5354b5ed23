"""Makes docs/results/time_scalability.md, .json and .png from the numbers of the studies' pages.

python docs/make/time_scalability.py
"""

import json
import sys
from statistics import mean, stdev
from typing import Any

import numpy as np
import pages

from tetdist.apps.reports import style
from tetdist.apps.studies.numbers import Difference, detectable, paired_difference
from tetdist.tables import markdown

# Page of a study, data, pairs of (SDT, TET) entries.
STUDIES: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "tet_vs_sdt_digits": ("digits", [("sdt_t2", "tet_t2"), ("sdt_t4", "tet_t4")]),
    "tet_vs_sdt_cifar10": (
        "CIFAR-10, 5,000 images",
        [("sdt_t2", "tet_t2"), ("sdt_t4", "tet_t4")],
    ),
    "any_t_cifar10": (
        "CIFAR-10, 10,000 images",
        [("sdt_t2", "tet_t2"), ("sdt_t4", "tet_t4")],
    ),
    "transformers_long": ("QKFormer, CIFAR-10, 10,000 images", [("sdt", "tet")]),
    "tet_vs_sdt_nmnist": ("N-MNIST", [("sdt_t4", "tet_t4"), ("sdt_t10", "tet_t10")]),
    "tet_vs_sdt_dvs128_objects": ("objects", [("sdt_t4", "tet_t4"), ("sdt_t10", "tet_t10")]),
    "across_days": ("objects, another day", [("sdt", "tet")]),
}
ABOUT = {
    "title": "Time scalability: trained at one T, tested at others",
    "question": "Does a network that was trained at one T keep its accuracy at others?",
}
TEXT = """The paper trains ResNet-19 on CIFAR-100 at T=2, 3 and 4 and tests it at T=2 to 8; its
curves rise, then fall a little. Here no network is fine-tuned at the T of test. Images are shown
again in every timestep; recordings go on, so more timesteps are also more input. All of CIFAR-10
was not tested beyond its T of training. Trainings of TET alone, among them the largest drops (T=1
and 2 tested at T=10), are in [any_t](any_t.md).

![Accuracy by test T](time_scalability.png)

{table}

Top-1 in percent, mean and standard deviation over seeds. *Change*: from the T of training to the
last T of test, for networks that were not trained at the last T, with 95 % intervals. *TET - SDT*
is at that T, paired by seed, uncorrected, with the minimum detectable effect. Everything is
recomputed from the JSON files of the studies' pages.

Command: `python docs/make/time_scalability.py`. Numbers:
[time_scalability.json](time_scalability.json).
"""


def numbers_of(study: str, entry: str) -> dict[str, Any]:
    """Return the T of training, those of test, and top-1 by seed, (seeds, tested T)."""
    found = json.loads((pages.RESULTS / f"{study}.json").read_text())
    tested = found["study"]["test_timesteps"]
    runs = sorted((r for r in found["runs"] if r["entry"] == entry), key=lambda r: r["seed"])
    top1 = [[run["by_timestep"][t - 1] for t in tested] for run in runs]
    return {"trained": runs[0]["timesteps"], "tested": tested, "top1": top1}


def compare(sdt: dict[str, Any], tet: dict[str, Any]) -> dict[str, Any]:
    """Return the changes from the T of training to the last T, and TET minus SDT at each T."""
    at, tested = tet["tested"].index(tet["trained"]), tet["tested"]
    of = {
        name: np.array(one["top1"])[: len(sdt["top1"])].T
        for name, one in zip("st", (sdt, tet), strict=True)
    }
    return {
        "change": {
            name: vars(paired_difference(of[key][-1].tolist(), of[key][at].tolist()))
            for name, key in (("sdt", "s"), ("tet", "t"))
            if at < len(tested) - 1
        },
        "tet - sdt": {
            t: vars(paired_difference(ours.tolist(), theirs.tolist()))
            for t, ours, theirs in zip(tested, of["t"], of["s"], strict=True)
        },
    }


def draw(found: dict[str, Any]) -> Any:
    figure = style.new_figure(17, 8)
    axes = figure.subplots(2, 4)
    axes.flat[-1].set_visible(False)
    for axis, one in zip(axes.flat, found.values(), strict=False):
        for colour, pair in zip(style.SERIES, one["pairs"].values(), strict=False):
            for loss, look in (("tet", "-"), ("sdt", (0, (4, 2)))):
                trained, tested, top1 = pair[loss].values()
                label = f"{loss.upper()}, trained at T={trained}"
                means, stds = np.mean(top1, axis=0), np.std(top1, axis=0, ddof=1)
                axis.fill_between(tested, means - stds, means + stds, color=colour, alpha=0.1, lw=0)
                axis.plot(tested, means, "o", ls=look, color=colour, ms=3.5, label=label)
                axis.plot(trained, means[tested.index(trained)], "o", ms=10, mfc="none", mec=colour)
        axis.set_xticks(tested)
        axis.set_xlabel("test T (ring: training T)")
        style.finish(axis, one["data"], style.ACCURACY, legend=False)
        axis.legend(frameon=False, fontsize=8, handlelength=3.5)
    return figure


def main() -> int:
    pages.no_flags(__doc__)
    found: dict[str, Any] = {}
    rows: list[list[str]] = []
    changes: dict[tuple[bool, str], list[float]] = {}
    gains: list[Difference] = []
    for study, (data, entries) in STUDIES.items():
        found[study] = {"data": data, "pairs": {}}
        for names in entries:
            sdt, tet = (numbers_of(study, name) for name in names)
            compared = compare(sdt, tet)
            found[study]["pairs"][names[1]] = {"tet": tet, "sdt": sdt, **compared}
            last = tet["tested"][-1]
            for loss, one in (("tet", tet), ("sdt", sdt)):
                columns = list(zip(*one["top1"], strict=True))
                cells = {
                    t: f"{mean(c):.1f} ± {stdev(c):.1f}"
                    for t, c in zip(one["tested"], columns, strict=True)
                }
                row = [f"[{data}]({study}.md), {loss.upper()}", str(one["trained"])]
                row += [cells[1], cells[one["trained"]], f"{cells[last]} (T={last})"]
                change = compared["change"].get(loss)
                if change:
                    of_images = "dvs128" not in study and "nmnist" not in study
                    changes.setdefault((of_images, loss), []).append(change["mean"])
                difference = Difference(**compared["tet - sdt"][last])
                row += [str(Difference(**change)) if change else ""]
                row += (
                    [str(difference), f"{detectable(difference):.2f}"]
                    if loss == "tet"
                    else ["", ""]
                )
                rows.append(row)
            if compared["change"]:
                gains.append(Difference(**compared["tet - sdt"][last]))
    ends = {key: (min(values), max(values)) for key, values in changes.items()}
    between = "{:+.1f} to {:+.1f} points with {}".format
    images, recordings = (
        " and ".join(between(*ends[of_images, loss], loss.upper()) for loss in ("tet", "sdt"))
        for of_images in (True, False)
    )
    answer = (
        f"From the T of training to the last T of test, top-1 changes by {images} on images, and "
        f"by {recordings} on recordings, where more timesteps are new input. At the last T, TET is "
        f"ahead of SDT in {sum(g.low > 0 for g in gains)} of {len(gains)} pairs of trainings and "
        f"behind in {sum(g.high < 0 for g in gains)} (uncorrected intervals)."
    )
    head = ["data, loss", "trained at T", "at T=1", "at that T", "at the last T"]
    head += ["change", "TET - SDT", "minimum detectable effect"]
    table = markdown(head, rows, numbers=True)
    page = pages.RESULTS / "time_scalability.md"
    text = TEXT.format(table=table)
    pages.write(page, ABOUT, answer, "3 or 5", {"studies": found}, text, draw(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
