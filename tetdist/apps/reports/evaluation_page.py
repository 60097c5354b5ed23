"""Results of an evaluation as text, as an HTML page and as a PNG.

All are made from the same dictionary, which is also the JSON file: checkpoint, model, step, split,
trained_timesteps, reported_timesteps and seed; data_split if the data have several; subset, the
names of the data's classes if they lack some of the network's; variant and protocol of ImageNet's
variants; measured_exit if it was measured; everything that `suite.run_suite` returns, where
``timesteps`` is the T of all values except ``per_timestep_*``; and the energy (`energy.estimate`)
if operations were counted.
"""

import base64
import html
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tetdist.apps.reports import style
from tetdist.apps.reports.energy import ASSUMED, EnergySection, Use
from tetdist.storage.files import replacing
from tetdist.tables import aligned, as_html, number
from tetdist.wording import counted

# Rows of the table of classes on a terminal; the JSON file and the page have all.
SHOWN_CLASSES = 20
# Largest numbers of classes for which a confusion matrix shows numbers, and names.
NUMBERED_CLASSES, NAMED_CLASSES = 20, 50
# Probability that a promise about early exit, by the samples it was chosen on, may be wrong.
DOUBT = 0.1

EvaluationResults = dict[str, Any]
Panel = Callable[[Any, EvaluationResults], None]
Table = list[list[str]]  # the first row is the head


class Section(NamedTuple):
    """Part of the results: sentences, tables, and panels with their size in inches."""

    title: str
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()
    panels: Sequence[Panel] = ()
    width: float = 6.5  # of a panel
    height: float = 4.0


def sections(found: EvaluationResults, *, brief: bool) -> list[Section]:
    """Return the results in order; if brief, with fewer classes and without assumptions."""
    has_exits = found["early_exit"] is not None
    operations, energy = found["operations"] or {"layers": {}}, found.get("energy")
    of_layers = [(found["firing_rate"], _firing_rate), (operations["layers"], _operations)]
    counts = operations_lines(found)
    if not found["firing_rate"]:
        counts.append("no firing rates: the network has no spiking neurons, or runs with --int8")
    rates = [[layer, f"{rate:.4f}"] for layer, rate in found["firing_rate"].items()]
    title = f"firing rate over {counted(found['timesteps'], 'timestep')}"
    return [
        Section(
            "Accuracy by timesteps, and early exit",
            _early_exit_lines(found),
            [_by_timesteps(found), *([_exits(found)] if has_exits else [])],
            [_timesteps, *([_early_exit] if has_exits else [])],
            height=4.5,
        ),
        *_robustness(found),
        Section(
            "Firing rates and operations",
            [*_unrolled(found), *counts],
            [[["layer", title], *rates]] if rates else [],
            [panel for values, panel in of_layers if values],
            height=1.5 + 0.22 * max(len(values) for values, _ in of_layers),
        ),
        *([_energy(energy, brief=brief)] if energy else []),
        Section("Classes", (), [_classes(found, brief=brief)], [_confusion], 9, 7.5),
    ]


def _by_timesteps(found: EvaluationResults) -> Table:
    specs = {"top1": ".2f", "top5": ".2f", "loss": ".4f"}
    return [["T", "top-1 %", "top-5 %", "loss"]] + [
        [str(t), *(format(found[f"per_timestep_{key}"][t - 1], specs[key]) for key in specs)]
        for t in found["reported_timesteps"]
    ]


def _exits(found: EvaluationResults) -> Table:
    return [["confidence", "top-1 %", "mean T"]] + [
        [f"{point['threshold']:g}", f"{point['top1']:.2f}", f"{point['mean_timesteps']:.3f}"]
        for point in found["early_exit"]
    ]


def _early_exit_lines(found: EvaluationResults) -> list[str]:
    if found["early_exit"] is None:
        return [
            "no early exit: the network is not causal, so its first logits depend on later "
            "timesteps"
        ]
    chosen = [_of_chosen_exit(found)] if "chosen_exit" in found else []
    chosen += [_of_measured_exit(found)] if "measured_exit" in found else []
    return [
        "early exit: a sample is decided at the first timestep at which the softmax of its "
        "time-mean reaches the confidence, or else at T",
        *chosen,
    ]


def _of_chosen_exit(found: EvaluationResults) -> str:
    chosen = found["chosen_exit"]
    samples, within = chosen["chosen_on"]["samples"], chosen["within"]
    least = 100 * (1 - DOUBT ** (1 / samples))
    bound = f"{samples} can limit it to {least:.2g} at best, with {1 - DOUBT:.0%} confidence"
    if 0 < within < least:
        bound += f"; a limit of {within:g} needs {math.ceil(math.log(DOUBT, 1 - within / 100))}"
    if chosen["chosen_on"]["top1"] is None:
        limit = f"at most {within:g} % of decisions changed on {samples} samples without labels"
    else:
        limit = f"at most {within:g} points lost on {samples} training samples held out"
    limit += f" ({bound})"
    if chosen["threshold"] is None:
        return f"early exit with {limit}: no threshold achieves this"
    lost = chosen["top1"] - found["top1"]
    return (
        f"early exit with {limit}: at confidence {chosen['threshold']:.4g}, "
        f"{chosen['top1']:.2f} % ({lost:+.2f} points) at T = {chosen['mean_timesteps']:.3f} on "
        "average"
    )


def _of_measured_exit(found: EvaluationResults) -> str:
    measured = found["measured_exit"]
    return (
        f"measured: {measured['images_per_s']:.1f} images/s, {measured['ratio']:.2f} times the "
        f"{measured['whole_pass_images_per_s']:.1f} of whole passes, at batch {measured['batch']} "
        f"and {counted(measured['threads'], 'thread')}; {measured['top1']:.2f} % at T = "
        f"{measured['mean_timesteps']:.3f} on average; "
        f"{counted(measured['differing'], 'decision')} unlike the whole pass's, "
        f"{measured['differing_within_1e-5']} of them within 1e-5 of the threshold"
    )


def _robustness(found: EvaluationResults) -> list[Section]:
    """Return the section on dropped timesteps and events, if any were dropped."""
    tables = [
        [[f"dropped {what}", "top-1 %"]]
        + [[f"{100 * at['share']:g} %", f"{at['top1']:.2f}"] for at in found[f"dropped_{what}"]]
        for what in ("timesteps", "events")
        if found[f"dropped_{what}"]
    ]
    text = (
        "a dropped timestep shows an image of the mean colour, or no events; each is dropped "
        f"independently, with seed {found['seed']}"
    )
    return [Section("Robustness", [text], tables, [_dropped])] if tables else []


def _unrolled(found: EvaluationResults) -> list[str]:
    """Return the sentence on --unroll, if it was given."""
    if "sub_timesteps" not in found:
        return []
    several = {name: most for name, most in found["sub_timesteps"].items() if most > 1}
    if not several:
        return ["nothing to unroll: the spikes that layers receive are already 0 or 1"]
    return [
        f"unrolled: {counted(len(several), 'layer')} into up to {max(several.values())} "
        "sub-timesteps of 0 and 1 per timestep"
    ]


def _classes(found: EvaluationResults, *, brief: bool) -> Table:
    """Return the table of classes; if brief, only those of lowest recall."""
    rows, head = found["per_class"], "class"
    if brief:
        rows = [row for row in rows if row["samples"]]
        if len(rows) > SHOWN_CLASSES:
            rows = sorted(rows, key=lambda row: row["recall"])[:SHOWN_CLASSES]
            head = f"the {SHOWN_CLASSES} classes of lowest recall"
    return [[head, "samples", "recall %", "precision %", "most often mistaken for"]] + [
        [
            row["class"],
            str(row["samples"]),
            number(row["recall"], ".2f"),
            number(row["precision"], ".2f"),
            f"{row['mistaken_for']} ({row['mistaken']})" if row["mistaken"] else "-",
        ]
        for row in rows
    ]


def operations_lines(found: EvaluationResults) -> list[str]:
    """Return sentences on operations and energy."""
    operations = found["operations"]
    if operations is None:
        return ["operations are only counted for tetdist's own networks, without --int8"]
    return [
        f"{quantity(operations['accumulates'])} accumulates and "
        f"{quantity(operations['multiply_accumulates'])} multiply-accumulates a sample at "
        f"T = {found['timesteps']}; the ReLU network with the same synapses: "
        f"{quantity(operations['relu_multiply_accumulates'])} multiply-accumulates",
        *(energy_lines(found["energy"]) if "energy" in found else []),
    ]


NETWORKS = {"spiking": "spiking", "bitmaps": "spikes as bitmaps", "relu": "ReLU"}


def energy_lines(energy: dict[str, Any]) -> list[str]:
    """Return sentences on the spike rates, and on the constants."""
    rate, even = energy["spike_rate"], energy["break_even_rate"]
    known = "no spikes reach a synapse"
    if rate is not None:
        known = f"mean spike rate at synapses {100 * rate:.3g} %; with memory, the spiking network "
        known += f"takes {'less' if even else 'more'} energy than the ReLU network "
        side = "below" if energy["wins_below"] else "above"
        known += f"{side} {100 * even:.3g} %" if 0 < even < 1 else "at any rate"
    assumed, changed = (
        ", ".join(f"{key}={energy['constants'][key]}" for key in keys)
        for keys in (ASSUMED, energy["changed"])
    )
    return [
        f"{known}; the ReLU network's activations have {counted(energy['activation_bits'], 'bit')}",
        f"energy is an estimate; assumed: {assumed}; other constants: arXiv 2409.08290v4 (22 nm), "
        "fitted to it for weights, membranes and products, and Horowitz (45 nm, 32-bit floating "
        "point) for arithmetic only" + (f"; changed by --energy: {changed}" if changed else ""),
    ]


def _energy(energy: dict[str, Any], *, brief: bool) -> Section:
    """Return the section on energy; if brief, only by cause."""

    def uj(pj: float) -> str:
        return f"{pj / 1e6:.4g}"

    only = energy["arithmetic_only_pj"]
    causes = [
        [cause, *(uj(energy[network]["pj"][cause]) for network in NETWORKS)]
        for cause in energy["relu"]["pj"]
    ]
    causes.append(["arithmetic only", uj(only["spiking"]), "-", uj(only["relu"])])
    head = ["energy, uJ a sample", *NETWORKS.values()]
    if brief:
        return Section("Energy", (), [[head, *causes]], [_energy_bars])
    uses = [
        [key.replace("_", " "), *(quantity(energy[network][key]) for network in NETWORKS)]
        for key in Use._fields
    ]
    layers = [["layer", "spike rate %", "break-even %", *(f"{n}, uJ" for n in NETWORKS.values())]]
    for name, one in energy["layers"].items():
        rates = [one[key] and 100 * one[key] for key in ("spike_rate", "break_even_rate")]
        totals = [uj(one[network]["pj"]["total"]) for network in NETWORKS]
        layers.append([name, *(number(rate, ".3g") for rate in rates), *totals])
    constants = [["constant", "value", "meaning (pJ, bits) and source of the default"]]
    for key, value in energy["constants"].items():
        meaning = " ".join((EnergySection.model_fields[key].description or "").split())
        constants.append([key, f"{value}{' (--energy)' * (key in energy['changed'])}", meaning])
    return Section(
        "Energy",
        energy["assumptions"],
        [[head, *causes], [["a sample", *NETWORKS.values()], *uses], layers, constants],
        [_energy_bars],
        height=2.5,
    )


def quantity(number: float) -> str:
    """Format a number with three digits and a unit, such as 1.23 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


# --- on a terminal --------------------------------------------------------------------------------


def as_text(found: EvaluationResults) -> str:
    """Return the results as text for a terminal."""
    parts = [heading(found), f"  {headline(found)}"]
    parts += [f"  {line}" for line in extra_lines(found)]
    for section in sections(found, brief=True):
        parts += [f"  {line}" for line in section.sentences]
        parts += [aligned(table, right=range(1, 4)) for table in section.tables]
    return "\n\n".join(parts)


def heading(found: EvaluationResults) -> str:
    of_split = f" of the split {found['data_split']}" if "data_split" in found else ""
    return (
        f"{_of_network(found)}, {counted(found['samples'], 'sample')} of {found['split']}{of_split}"
        f"{_of_variant(found)}{_of_subset(found)}"
    )


def headline(found: EvaluationResults) -> str:
    """Return the sentence on the accuracy at the T of everything but the table by T."""
    return (
        f"top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %, loss {found['loss']:.4f} at "
        f"T = {found['timesteps']}, which applies to everything not listed by T; trained at T = "
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
    """Name the data's classes, if they are not all of the network's."""
    present = found.get("subset")
    if present is None:
        return ""
    known = len(found["classes"])
    more = f" and {len(present) - 5} more" if len(present) > 5 else ""
    return (
        f", with {len(present)} of the {known} classes of the network "
        f"({', '.join(present[:5])}{more}); it chose among all {known}"
    )


def extra_lines(found: EvaluationResults) -> list[str]:
    """Return the lines on other labels and on real numbers, if these were compared."""
    lines = [real_line(found)] if "real" in found else []
    if (numbers := found.get("real_numbers")) is not None:
        lines.append(
            f"in whole numbers (--int8); in real numbers top-1 {numbers['top1']:.2f} %; different "
            f"decisions: {numbers['changed']:,} of {found['samples']:,}"
        )
    return lines


def real_line(found: EvaluationResults) -> str:
    """Return the line on accuracy with the several labels of each image (real.json)."""
    real = found["real"]
    if real["top1"] is None:
        return "real labels: none of the images has one"
    return (
        f"real labels: top-1 {real['top1']:.2f} % of the {counted(real['samples'], 'image')} that "
        f"have one, at T = {found['timesteps']}"
    )


def corruptions_as_text(found: EvaluationResults) -> str:
    """Return an evaluation of corruptions as text: top-1 by severity."""
    top1, mean, mce = found["corruptions"], found["mean_error"], found["mce"]
    severities = sorted({severity for by_severity in top1.values() for severity in by_severity})
    rows = [["top-1 % at severity", *map(str, severities)]] + [
        [name, *(number(by_severity.get(one), ".2f") for one in severities)]
        for name, by_severity in top1.items()
    ]
    lines = [
        f"{_of_network(found)}, imagenet-c at T = {found['timesteps']}",
        "",
        aligned(rows, right=range(1, len(rows[0]))),
        "",
    ]
    if mean is not None:
        lines.append(
            f"  mean error {mean:.2f} % over those of the 15 published corruptions that exist"
        )
    if mce is None:
        lines.append("  no mean corruption error (mCE): it needs all 15, each at 5 severities")
    else:
        lines.append(f"  mean corruption error (mCE) {mce:.2f} %, relative to AlexNet's errors")
    return "\n".join(lines)


# --- as a page or PNG -----------------------------------------------------------------------------


def write_page(found: EvaluationResults, out: Path) -> None:
    """Write a self-contained HTML page or a PNG, depending on the suffix, atomically.

    Raises:
        UserError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    assert out.suffix in (".png", ".html"), out.suffix
    page = png_page(found) if out.suffix == ".png" else html_page(found).encode()
    with replacing(out) as stream:
        stream.write(page)


def png_page(found: EvaluationResults) -> bytes:
    """Draw all panels into one PNG."""
    panels = [panel for part in sections(found, brief=True) for panel in part.panels]
    operations = found["operations"] or {"layers": {}}
    layers = max(len(found["firing_rate"]), len(operations["layers"]))
    height = max(5.0, 1.5 + 0.16 * layers)
    rows = (len(panels) + 2) // 3
    figure = style.new_figure(18, 0.8 + height * rows)
    axes = figure.subplots(rows, 3, squeeze=False).flat
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes, panels, strict=False):
        panel(axis, found)
    lines = [heading(found), headline(found), *operations_lines(found)]
    title = "\n".join(textwrap.fill(line, 180) for line in lines)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    if "energy" in found:
        assumptions = f"Assumptions: {'; '.join(found['energy']['assumptions'])}."
        figure.supxlabel(
            textwrap.fill(assumptions, 240), x=0.01, ha="left", fontsize=9, color=style.QUIET
        )
    return style.png(figure)


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
            label=f"training T: {trained}",
        )
    axis.set_xlabel("timesteps T")
    axis.xaxis.get_major_locator().set_params(integer=True)
    style.finish(axis, "Accuracy by timesteps", style.ACCURACY)


def _early_exit(axis: Any, found: EvaluationResults) -> None:
    curve = found["early_exit"]
    spent, top1 = ([point[key] for point in curve] for key in ("mean_timesteps", "top1"))
    axis.plot(spent, top1, "o-", color=style.RATE, label="early exit by confidence")
    room = 0.1 * found["timesteps"]  # width of a label
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
    axis.plot(steps, top1, "--", color=style.QUIET, label="same T for all samples")
    axis.set_xlabel("average timesteps a sample")
    style.finish(axis, "Early exit", style.ACCURACY)


def _confusion(axis: Any, found: EvaluationResults) -> None:
    names = found["classes"]
    fractions = [[count / max(sum(row), 1) for count in row] for row in found["confusion"]]
    axis.imshow(fractions, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    if len(names) <= NUMBERED_CLASSES:
        for i, row in enumerate(found["confusion"]):
            for j, count in enumerate(row):
                if count:
                    colour = "white" if fractions[i][j] > 0.5 else "black"
                    axis.text(j, i, count, ha="center", va="center", fontsize=7, color=colour)
    if len(names) <= NAMED_CLASSES:
        axis.set_xticks(range(len(names)), labels=names, rotation=90)
        axis.set_yticks(range(len(names)), labels=names)
    axis.tick_params(labelsize=8 if len(names) <= NUMBERED_CLASSES else 5, length=0)
    axis.set_xlabel("predicted", fontsize=9)
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


def _energy_bars(axis: Any, found: EvaluationResults) -> None:
    energy, colours = found["energy"], (style.TRAIN, style.WAIT, style.RATE, style.SPEED)
    styles = list(zip(colours, ("weights", "activations", "membranes", "arithmetic"), strict=True))
    bars = [[energy[n]["pj"][cause] / 1e6 for n in NETWORKS] for _, cause in styles]
    _layer_bars(axis, list(NETWORKS.values()), bars, styles)
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    axis.set_title("Energy with memory", loc="left", fontsize=11, fontweight="bold")
    axis.set_xlabel("uJ a sample", fontsize=9)


def _layer_bars(
    axis: Any, layers: list[str], values: list[Any], styles: list[tuple[str, str]]
) -> None:
    """Draw stacked bars, one row for each layer, the first one at the top."""
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
            percent = [0.0, *(100 * at["share"] for at in found[key])]
            top1 = [found["top1"], *(at["top1"] for at in found[key])]
            axis.plot(percent, top1, "o-", color=colour, label=key.replace("_", " "))
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
    """Return the page with embedded figures, without external resources or scripts."""
    parts = [f"<h1>{html.escape(heading(found))}</h1>", f"<p><b>{headline(found)}.</b></p>"]
    parts += [f"<p>{html.escape(line)}</p>" for line in extra_lines(found)]
    for section in sections(found, brief=False):
        parts.append(f"<h2>{section.title}</h2>")
        if section.panels:
            parts.append(_image(found, section))
        parts += [f"<p>{html.escape(line)}</p>" for line in section.sentences]
        parts += map(as_html, section.tables)
    title = html.escape(f"{found['model']}: {found['top1']:.2f} %")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _image(found: EvaluationResults, section: Section) -> str:
    columns = len(section.panels)
    figure = style.new_figure(section.width * columns, section.height, dpi=100)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis, panel in zip(axes, section.panels, strict=True):
        panel(axis, found)
    data = base64.b64encode(style.png(figure)).decode()
    return f'<p><img alt="" src="data:image/png;base64,{data}"></p>'
