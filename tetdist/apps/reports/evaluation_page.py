"""The results of an evaluation as text, as a page to look at and as a picture.

All are made of the same dictionary, which the JSON file holds: checkpoint, model, step, split,
trained_timesteps, reported_timesteps and seed; data_split where the data have several; subset, the
names of the data's classes, where these are not all of the network's; variant and protocol of one
of ImageNet's; and all that `suite.run_suite` returns, of which ``timesteps`` is the T of all but
``per_timestep_*``.
"""

import base64
import html
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tetdist import tables
from tetdist.apps.reports import style
from tetdist.storage.files import replacing
from tetdist.wording import counted

# Rows of the table of classes on a terminal; the JSON file and the page have all.
SHOWN_CLASSES = 20
# Classes up to which a confusion matrix has room for numbers, and for names.
NUMBERED_CLASSES, NAMED_CLASSES = 20, 50

EvaluationResults = dict[str, Any]

NO_EARLY_EXIT = (
    "no early exit: the network is not causal, so that its first logits depend on the timesteps "
    "that come after them"
)


# --- on a terminal --------------------------------------------------------------------------------


def as_text(found: EvaluationResults) -> str:
    """The text that a person reads on a terminal."""
    return "\n\n".join(
        [
            heading(found),
            _text_sweep(found),
            f"  {headline(found)}",
            *_text_real(found),
            _text_early_exit(found),
            *_text_dropped(found),
            *_text_unrolled(found),
            _text_classes(found),
            _text_operations(found),
            _text_firing_rates(found),
        ]
    )


def _text_unrolled(found: EvaluationResults) -> list[str]:
    """Return the lines on --unroll, if it was given."""
    if "sub_timesteps" not in found:
        return []
    several = {name: most for name, most in found["sub_timesteps"].items() if most > 1}
    if not several:
        return ["  nothing to unroll: every layer that sees spikes sees 0 and 1 as it is"]
    return [
        f"  unrolled: {counted(len(several), 'layer')} in up to {max(several.values())} "
        "sub-timesteps of 0 and 1 a timestep"
    ]


def heading(found: EvaluationResults) -> str:
    of_split = f" of the split {found['data_split']}" if "data_split" in found else ""
    return (
        f"{_of_network(found)}, {counted(found['samples'], 'sample')} of {found['split']}{of_split}"
        f"{_of_variant(found)}{_of_subset(found)}"
    )


def headline(found: EvaluationResults) -> str:
    """Return the sentence on the accuracy at the one T that all but the table of T is of."""
    return (
        f"top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %, loss {found['loss']:.4f} at "
        f"T = {found['timesteps']}, as is all that is not listed by T; trained at T = "
        f"{found['trained_timesteps']}"
    )


def _of_network(found: EvaluationResults) -> str:
    averaged = f" ({found['averaged']})" if "averaged" in found else ""
    return f"{found['checkpoint']}: {found['model']}, step {found['step']}{averaged}"


def _of_variant(found: EvaluationResults) -> str:
    if "variant" not in found:
        return ""
    protocol = f": {found['protocol']}" if "protocol" in found else ""
    return f" ({found['variant']}{protocol})"


def _of_subset(found: EvaluationResults) -> str:
    """Name the classes that the data have, where these are not all that the network knows."""
    present = found.get("subset")
    if present is None:
        return ""
    known = len(found["classes"])
    more = f" and {len(present) - 5} more" if len(present) > 5 else ""
    return (
        f", which have {len(present)} of its {known} classes ({', '.join(present[:5])}{more}); it"
        f" chose among all {known}"
    )


def _text_sweep(found: EvaluationResults) -> str:
    lines = ["  T   top-1 %   top-5 %     loss"]
    for t in found["reported_timesteps"]:
        top1, top5, loss = (found[f"per_timestep_{key}"][t - 1] for key in ("top1", "top5", "loss"))
        lines.append(f"{t:3}{top1:10.2f}{top5:10.2f}{loss:9.4f}")
    return "\n".join(lines)


def _text_real(found: EvaluationResults) -> list[str]:
    return [f"  {real_line(found)}"] if "real" in found else []


def real_line(found: EvaluationResults) -> str:
    """Return the line on accuracy by several labels of each image."""
    real = found["real"]
    if real["top1"] is None:
        return "real labels: no image has one"
    return (
        f"real labels: top-1 {real['top1']:.2f} % of the {counted(real['samples'], 'image')} that "
        f"have one, at T = {found['timesteps']}"
    )


def corruptions_as_text(found: EvaluationResults) -> str:
    """The text of an evaluation of corruptions: top-1 by severity."""
    severities = sorted({s for by_severity in found["corruptions"].values() for s in by_severity})
    width = max(map(len, found["corruptions"]))
    lines = [f"  {'top-1 % at severity':{width}}" + "".join(f"{s:8}" for s in severities)]
    width = len(lines[0]) - 8 * len(severities) - 2
    for name, by_severity in found["corruptions"].items():
        cells = [f"{by_severity[s]:8.2f}" if s in by_severity else f"{'-':>8}" for s in severities]
        lines.append(f"  {name:{width}}{''.join(cells)}")
    lines.append("")
    mean, mce = found["mean_error"], found["mce"]
    if mean is not None:
        lines.append(
            f"  mean error {mean:.2f} % of those of the 15 published corruptions that are there"
        )
    if mce is None:
        lines.append("  no mean corruption error: it is of all 15, each at 5 severities")
    else:
        lines.append(f"  mean corruption error (mCE) {mce:.2f} %, each error over AlexNet's")
    heading = f"{_of_network(found)}, imagenet-c at T = {found['timesteps']}"
    return "\n".join([heading, "", *lines])


def _text_early_exit(found: EvaluationResults) -> str:
    if found["early_exit"] is None:
        return f"  {NO_EARLY_EXIT}"
    lines = ["  early exit: at confidence   top-1 %   mean T"]
    for point in found["early_exit"]:
        spent = point["mean_timesteps"]
        lines.append(f"{point['threshold']:29g}{point['top1']:10.2f}{spent:9.3f}")
    if "chosen_exit" in found:
        lines += ["", f"  {_of_chosen_exit(found)}"]
    return "\n".join(lines)


def _of_chosen_exit(found: EvaluationResults) -> str:
    chosen = found["chosen_exit"]
    samples = chosen["chosen_on"]["samples"]
    on = f"{counted(samples, 'training sample')} held out (one is {100 / samples:.2g} points)"
    limit = f"at most {chosen['within']:g} points lost on {on}"
    if chosen["threshold"] is None:
        return f"early exit with {limit}: at no threshold"
    lost = chosen["top1"] - found["top1"]
    return (
        f"early exit with {limit}: at confidence {chosen['threshold']:.4g}, "
        f"{chosen['top1']:.2f} % ({lost:+.2f} points) at T = {chosen['mean_timesteps']:.3f} on "
        "average"
    )


def _text_dropped(found: EvaluationResults) -> list[str]:
    return [
        "\n".join(
            [f"  dropped {what}   top-1 %"]
            + [f"{100 * at['share']:{len(what) + 8}g} %{at['top1']:10.2f}" for at in found[key]]
        )
        for what, key in (("timesteps", "dropped_timesteps"), ("events", "dropped_events"))
        if found[key]
    ]


def _text_classes(found: EvaluationResults) -> str:
    rows = [row for row in found["per_class"] if row["samples"]]
    title = "  class: samples, recall %, precision %, taken for"
    if len(rows) > SHOWN_CLASSES:
        rows = sorted(rows, key=lambda row: row["recall"])[:SHOWN_CLASSES]
        title = f"  the {SHOWN_CLASSES} classes of least recall{title[7:]}"
    width = max(len(row["class"]) for row in rows)
    lines = [title]
    for row in rows:
        mistaken = f"{row['mistaken_for']} ({row['mistaken']})" if row["mistaken"] else "-"
        lines.append(
            f"  {row['class']:{width}}{row['samples']:7}{row['recall']:8.2f}"
            f"{_or_dash(row['precision']):>8}  {mistaken}"
        )
    return "\n".join(lines)


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _text_operations(found: EvaluationResults) -> str:
    lines = operations_lines(found)
    if found["operations"]:
        lines[-1] += " (an estimate; --json and --report state its assumptions)"
    return "\n".join(f"  {line}" for line in lines)


def operations_lines(found: EvaluationResults) -> list[str]:
    """Sentences on operations and energy."""
    operations = found["operations"]
    if operations is None:
        return ["operations are not counted: they are of tetdist's own networks only"]
    share = operations["energy_pj"] / operations["relu_energy_pj"]
    return [
        f"{quantity(operations['accumulates'])} accumulates and "
        f"{quantity(operations['multiply_accumulates'])} multiply-accumulates a sample at "
        f"T = {found['timesteps']}: about {operations['energy_pj'] / 1e6:.4g} uJ",
        f"the ReLU network of the same synapses: "
        f"{quantity(operations['relu_multiply_accumulates'])} multiply-accumulates, about "
        f"{operations['relu_energy_pj'] / 1e6:.4g} uJ; the spiking one takes {100 * share:.3g} % "
        "of it",
    ]


def quantity(number: float) -> str:
    """Three digits and a unit: 1.23 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def _text_firing_rates(found: EvaluationResults) -> str:
    if not found["firing_rate"]:
        return "  no firing rates: a network without neurons that fire"
    lines = [f"  firing rate over {counted(found['timesteps'], 'timestep')}"]
    lines += [f"{rate:10.4f}  {layer}" for layer, rate in found["firing_rate"].items()]
    return "\n".join(lines)


# --- as a picture ---------------------------------------------------------------------------------

Panel = Callable[[Any, EvaluationResults], None]


def write_page(found: EvaluationResults, out: Path) -> None:
    """Write a self-contained HTML page or, by the name's end, a PNG; whole or not at all.

    Raises:
        UserError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    match out.suffix:
        case ".png":
            page = png_page(found)
        case ".html":
            page = html_page(found).encode()
        case other:
            raise AssertionError(f"neither .html nor .png: {other}")
    with replacing(out) as stream:
        stream.write(page)


def png_page(found: EvaluationResults) -> bytes:
    """All panels in one PNG."""
    panels = [panel for panel, wanted in _panels(found) if wanted]
    operations = found["operations"] or {"layers": {}, "assumptions": []}
    layers = max(len(found["firing_rate"]), len(operations["layers"]))
    height = max(5.0, 1.5 + 0.16 * layers)
    rows = (len(panels) + 2) // 3
    figure = style.new_figure(18, 0.8 + height * rows)
    axes = figure.subplots(rows, 3, squeeze=False).flat
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes, panels, strict=False):
        panel(axis, found)
    title = "\n".join([heading(found), headline(found), *operations_lines(found)])
    figure.suptitle(title, fontsize=11, fontweight="bold")
    if operations["assumptions"]:
        assumptions = f"Energy is an estimate: {'; '.join(operations['assumptions'])}."
        figure.supxlabel(
            textwrap.fill(assumptions, 240), x=0.01, ha="left", fontsize=9, color=style.QUIET
        )
    return style.png(figure)


def _panels(found: EvaluationResults) -> list[tuple[Panel, bool]]:
    """The panels in their order, and whether there is something to show."""
    return [
        (_timesteps, True),
        (_early_exit, found["early_exit"] is not None),
        (_confusion, True),
        (_firing_rate, bool(found["firing_rate"])),
        (_operations, bool(found["operations"])),
        (_dropped, bool(found["dropped_timesteps"] or found["dropped_events"])),
    ]


def _timesteps(axis: Any, found: EvaluationResults) -> None:
    trained = found["trained_timesteps"]
    known = found["per_timestep_top1"]
    evaluated = trained <= len(known) and known[trained - 1] is not None
    shown = sorted({*found["reported_timesteps"], *([trained] if evaluated else [])})
    top1 = [found["per_timestep_top1"][t - 1] for t in shown]
    axis.plot(shown, top1, "o-", color=style.VALIDATION, label="top-1")
    if evaluated:
        axis.plot(
            trained,
            top1[shown.index(trained)],
            "*",
            color=style.VALIDATION,
            markeredgecolor="black",
            markersize=14,
            label=f"T of the training: {trained}",
        )
    axis.set_xlabel("timesteps T")
    axis.xaxis.get_major_locator().set_params(integer=True)
    style.finish(axis, "Accuracy by timesteps", style.ACCURACY)


def _early_exit(axis: Any, found: EvaluationResults) -> None:
    curve = found["early_exit"]
    spent, top1 = ([point[key] for point in curve] for key in ("mean_timesteps", "top1"))
    axis.plot(spent, top1, "o-", color=style.RATE, label="exit at a confidence")
    room = 0.1 * found["timesteps"]  # that a label takes
    labelled: list[float] = []
    for point in (curve[0], curve[-1], curve[len(curve) // 2]):
        if any(abs(point["mean_timesteps"] - there) < room for there in labelled):
            continue
        labelled.append(point["mean_timesteps"])
        axis.annotate(
            f"{point['threshold']:g}",
            (point["mean_timesteps"], point["top1"]),
            xytext=(4, -12),
            textcoords="offset points",
            fontsize=8,
            color=style.RATE,
        )
    steps = range(1, found["timesteps"] + 1)
    top1 = found["per_timestep_top1"][: found["timesteps"]]
    axis.plot(steps, top1, "--", color=style.QUIET, label="the same T for all")
    axis.set_xlabel("timesteps of a sample on average")
    style.finish(axis, "Early exit", style.ACCURACY)


def _confusion(axis: Any, found: EvaluationResults) -> None:
    names = found["classes"]
    shares = [[count / max(sum(row), 1) for count in row] for row in found["confusion"]]
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    if len(names) <= NUMBERED_CLASSES:
        for i, row in enumerate(found["confusion"]):
            for j, count in enumerate(row):
                if count:
                    colour = "white" if shares[i][j] > 0.5 else "black"
                    axis.text(j, i, count, ha="center", va="center", fontsize=7, color=colour)
    if len(names) <= NAMED_CLASSES:
        axis.set_xticks(range(len(names)), labels=names, rotation=90)
        axis.set_yticks(range(len(names)), labels=names)
    axis.tick_params(labelsize=8 if len(names) <= NUMBERED_CLASSES else 5, length=0)
    axis.set_xlabel("decided", fontsize=9)
    axis.set_ylabel("true", fontsize=9)
    title = f"Confusion at T = {found['timesteps']}"
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")


def _firing_rate(axis: Any, found: EvaluationResults) -> None:
    rates = found["firing_rate"]
    _layer_bars(axis, list(rates), [(100 * r for r in rates.values())], [(style.RATE, "")])
    title = f"Firing rate over {counted(found['timesteps'], 'timestep')}"
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axis.set_xlabel("spikes per neuron per timestep (%)", fontsize=9)


def _operations(axis: Any, found: EvaluationResults) -> None:
    layers = found["operations"]["layers"]
    bars: list[list[float]] = []
    styles: list[tuple[str, str]] = []
    for key, colour in (("accumulates", style.TRAIN), ("multiply_accumulates", style.WAIT)):
        millions = [layer[key] / 1e6 for layer in layers.values()]
        if any(millions):
            bars.append(millions)
            styles.append((colour, key.replace("_", "-")))
    _layer_bars(axis, list(layers), bars, styles)
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    axis.set_title("Synaptic operations", loc="left", fontsize=11, fontweight="bold")
    axis.set_xlabel("millions a sample", fontsize=9)


def _layer_bars(
    axis: Any, layers: list[str], values: list[Any], styles: list[tuple[str, str]]
) -> None:
    """Bars end to end, a row a layer, the first one at the top."""
    starts = [0.0] * len(layers)
    rows = range(len(layers))
    for of_kind, (colour, label) in zip(values, styles, strict=True):
        widths = list(of_kind)
        axis.barh(rows, widths, left=starts, color=colour, label=label, height=0.75)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axis.set_yticks(rows, labels=layers)
    axis.set_ylim(len(layers) - 0.4, -0.6)
    axis.tick_params(labelsize=8)
    axis.grid(axis="x", color="#E4E4E4", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _dropped(axis: Any, found: EvaluationResults) -> None:
    for key, colour in (("dropped_timesteps", style.SPEED), ("dropped_events", style.WAIT)):
        if found[key]:
            shares = [0.0, *(100 * at["share"] for at in found[key])]
            top1 = [found["top1"], *(at["top1"] for at in found[key])]
            axis.plot(shares, top1, "o-", color=colour, label=key.replace("_", " "))
    axis.set_xlabel("dropped (%)")
    style.finish(axis, "Robustness", style.ACCURACY)


# --- as a page ------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
  color: #222 }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .15rem .8rem; text-align: right; border-bottom: 1px solid #e4e4e4 }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; vertical-align: top } .note { color: #555; font-size: .9rem }
"""


def html_page(found: EvaluationResults) -> str:
    """The page, with its pictures within it, and nothing that is fetched or run."""
    by_timesteps: list[Panel] = [_timesteps]
    if found["early_exit"] is not None:
        by_timesteps.append(_early_exit)
    parts = [
        f"<h1>{html.escape(heading(found))}</h1>",
        f"<p><b>{headline(found)}.</b></p>",
        *([f"<p>{html.escape(real_line(found))}</p>"] if "real" in found else []),
        "<h2>Accuracy by timesteps, and early exit</h2>",
        _image(found, by_timesteps, 6.5 * len(by_timesteps), 4.5),
        tables.as_html(
            ["T", "top-1 %", "top-5 %", "loss"],
            [
                [
                    str(t),
                    f"{found['per_timestep_top1'][t - 1]:.2f}",
                    f"{found['per_timestep_top5'][t - 1]:.2f}",
                    f"{found['per_timestep_loss'][t - 1]:.4f}",
                ]
                for t in found["reported_timesteps"]
            ],
        ),
        *_html_early_exit(found),
    ]
    if found["dropped_timesteps"] or found["dropped_events"]:
        parts += [
            "<h2>Robustness</h2>",
            _image(found, [_dropped], 6.5, 4),
            '<p class="note">A dropped timestep shows an image of the mean colour, or no events; '
            f"each is dropped by itself, with seed {found['seed']}.</p>",
        ]
    operations = found["operations"] or {"layers": {}, "assumptions": []}
    layers = max(len(found["firing_rate"]), len(operations["layers"]))
    panels: list[Panel] = [_firing_rate] if found["firing_rate"] else []
    if operations["layers"]:
        panels.append(_operations)
    parts += [
        "<h2>Firing rates and operations</h2>",
        *([_image(found, panels, 6.5 * len(panels), 1.5 + 0.22 * layers)] if panels else []),
        *(f"<p>{html.escape(line)}</p>" for line in operations_lines(found)),
        "<ul class=note>",
        *(f"<li>{html.escape(text)}</li>" for text in operations["assumptions"]),
        "</ul>",
        "<h2>Classes</h2>",
        _image(found, [_confusion], 9, 7.5),
        tables.as_html(
            ["class", "samples", "recall %", "precision %", "most often taken for"],
            [
                [
                    row["class"],
                    str(row["samples"]),
                    _or_dash(row["recall"]),
                    _or_dash(row["precision"]),
                    f"{row['mistaken_for']} ({row['mistaken']})" if row["mistaken"] else "-",
                ]
                for row in found["per_class"]
            ],
        ),
    ]
    title = html.escape(f"{found['model']}: {found['top1']:.2f} %")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _html_early_exit(found: EvaluationResults) -> list[str]:
    if found["early_exit"] is None:
        return [f'<p class="note">{html.escape(NO_EARLY_EXIT.capitalize())}.</p>']
    return [
        '<p class="note">Early exit: a sample is decided at the first timestep at which the '
        "softmax of its time-mean reaches the confidence, at the latest at T.</p>",
        tables.as_html(
            ["confidence", "top-1 %", "mean T"],
            [
                [f"{p['threshold']:g}", f"{p['top1']:.2f}", f"{p['mean_timesteps']:.3f}"]
                for p in found["early_exit"]
            ],
        ),
        *([f"<p>{_of_chosen_exit(found).capitalize()}.</p>"] if "chosen_exit" in found else []),
    ]


def _image(found: EvaluationResults, panels: list[Panel], width: float, height: float) -> str:
    figure = style.new_figure(width, height, dpi=100)
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axis, found)
    data = base64.b64encode(style.png(figure)).decode()
    return f'<p><img alt="" src="data:image/png;base64,{data}"></p>'
