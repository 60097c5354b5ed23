"""Results of an evaluation as text, and as an HTML page with the same text and plots.

Both are made from the dictionary that is also the JSON file: `evaluated.Opened.about`, everything
that `suite.run_suite` returns, and real_numbers and measured_exit if they apply.
"""

import base64
import html
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from tetdist.apps.reports import style
from tetdist.evaluation.early_exit import FINE_THRESHOLDS
from tetdist.evaluation.energy import ASSUMED
from tetdist.tables import aligned, as_html, number
from tetdist.wording import and_more, counted

SHOWN_CLASSES, NAMED_CLASSES = 20, 50  # most rows of the table, and names of the confusion matrix
DOUBT = 0.1  # probability that what early exit promises, by its samples, is wrong
NETWORKS = {"spiking": "spiking", "bitmaps": "spikes as bitmaps", "relu": "ReLU"}

EvaluationResults = dict[str, Any]


class Section(NamedTuple):
    """Part of the results: sentences, tables, and panels with their size in inches."""

    title: str
    sentences: Sequence[str]
    tables: Sequence[list[list[str]]]  # each with its head as the first row
    panels: Sequence[Callable[[Any], None]]  # each draws on an axis of matplotlib
    width: float = 6.5  # of a panel
    height: float = 4.5


def as_text(found: EvaluationResults) -> str:
    """Return the results as text for a terminal."""
    parts = [heading(found), *(f"  {line}" for line in headlines(found))]
    for section in sections(found):
        parts += [section.title, *(f"  {line}" for line in section.sentences)]
        parts += [aligned(table, right=range(1, 4)) for table in section.tables]
    return "\n\n".join(parts)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222 }
body { max-width: 70rem; margin: auto; padding: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } img { max-width: 100% }
th, td { padding: .15rem .8rem; text-align: right; border-bottom: 1px solid #e4e4e4 }
th:first-child, td:first-child { text-align: left }
"""


def html_page(found: EvaluationResults) -> str:
    """Return the page with embedded plots, without external resources or scripts."""
    parts = [f"<h1>{html.escape(heading(found))}</h1>"]
    parts += [f"<p>{html.escape(line)}.</p>" for line in headlines(found)]
    for section in sections(found):
        parts.append(f"<h2>{section.title}</h2>")
        if columns := len(section.panels):
            figure = style.new_figure(section.width * columns, section.height, dpi=100)
            axes = figure.subplots(1, columns, squeeze=False)[0]
            for axis, draw in zip(axes, section.panels, strict=True):
                draw(axis)
            image = base64.b64encode(style.png(figure)).decode()
            parts.append(f'<p><img alt="" src="data:image/png;base64,{image}"></p>')
        parts += [f"<p>{html.escape(line)}</p>" for line in section.sentences]
        parts += map(as_html, section.tables)
    title = html.escape(f"{found['model']}: {found['top1']:.2f} %")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def heading(found: EvaluationResults) -> str:
    """Name the network, the data, and their classes if these are not all of the network's."""
    averaged = f" ({found['averaged']})" if "averaged" in found else ""
    of_split = f" of the split {found['data_split']}" if "data_split" in found else ""
    present, known, subset = found.get("subset"), len(found["classes"]), ""
    if present:
        names = f"{', '.join(present[:5])}{and_more(present, 5)}"
        subset = f", with {len(present)} of the {known} classes of the network ({names}); it "
        subset += f"chose among all {known}"
    return (
        f"{found['checkpoint']}: {found['model']}, step {found['step']}{averaged}, "
        f"{counted(found['samples'], 'sample')} of {found['split']}{of_split}{subset}"
    )


def headlines(found: EvaluationResults) -> list[str]:
    """Return the sentences on the accuracy, the published one, and that in real numbers."""
    top5 = f", top-5 {found['top5']:.2f} %" if len(found["classes"]) > 5 else ""
    lines = [
        f"top-1 {found['top1']:.2f} %{top5}, loss {found['loss']:.4f} at "
        f"T={found['timesteps']}; trained at T={found['trained_timesteps']}",
        *([_of_published(found["published"])] if "published" in found else []),
        f"All numbers below are at T={found['timesteps']} unless a T is given",
    ]
    if (numbers := found.get("real_numbers")) is not None:
        lines.append(
            f"in whole numbers (--int8); in real numbers top-1 {numbers['top1']:.2f} %; different "
            f"decisions: {numbers['changed']:,} of {found['samples']:,}"
        )
    return lines


def _of_published(claim: dict[str, Any]) -> str:
    """Return the sentence on what the authors of converted weights claim."""
    top1 = "no top-1" if claim["top1"] is None else f"top-1 {claim['top1']:.2f} %"
    place = f"for {claim['data']} at T={claim['timesteps']} ({claim['page']})"
    return f"published: {top1} {place}. {claim['known']}".rstrip(".")


def sections(found: EvaluationResults) -> list[Section]:
    """Return the results in order."""
    energy = [_energy(found["energy"])] if "energy" in found else []
    return [_accuracy(found), _early_exit(found), _counts(found), *energy, _classes(found)]


def _accuracy(found: EvaluationResults) -> Section:
    shown = {"top1": ("top-1 %", ".2f"), "top5": ("top-5 %", ".2f"), "loss": ("loss", ".4f")}
    if len(found["classes"]) <= 5:
        del shown["top5"]
    by_timesteps = [["T", *(title for title, _ in shown.values())]] + [
        [str(t), *(format(found[f"per_timestep_{k}"][t - 1], f) for k, (_, f) in shown.items())]
        for t in found["reported_timesteps"]
    ]
    return Section("Accuracy at each T", [], [by_timesteps], [partial(_draw_timesteps, found)])


def _early_exit(found: EvaluationResults) -> Section:
    if found["early_exit"] is None:
        sentence = "no early exit: the network is not causal, so its first logits depend on later "
        return Section("Early exit", [f"{sentence}timesteps"], [], [])
    points = {one["threshold"]: one for one in [*found["early_exit"], *_chosen_point(found)]}
    exits = [["confidence", "top-1 %", "mean T"]] + [
        [
            f"{threshold:.4g}" + (" (chosen)" if "within" in point else ""),
            f"{point['top1']:.2f}",
            f"{point['mean_timesteps']:.3f}",
        ]
        for threshold, point in sorted(points.items())
    ]
    sentences = [
        "early exit: a sample is decided at the first timestep at which the softmax of its "
        "time-mean reaches the confidence, or else at T"
    ]
    if "chosen_exit" in found:
        sentences.append(_of_chosen_exit(found["chosen_exit"], found))
    if (measured := found.get("measured_exit")) is not None:
        sentences.append(
            f"measured: {measured['images_per_s']:.1f} images/s, {measured['ratio']:.2f} times the "
            f"{measured['whole_pass_images_per_s']:.1f} of whole passes, at batch "
            f"{measured['batch']} and {counted(measured['threads'], 'thread')}; "
            f"{measured['top1']:.2f} % at T = {measured['mean_timesteps']:.3f} on average; "
            f"{counted(measured['differing'], 'decision')} unlike the whole pass's, "
            f"{measured['differing_within_1e-5']} of them within 1e-5 of the threshold"
        )
    return Section("Early exit", sentences, [exits], [partial(_draw_exits, found)])


def _chosen_point(found: EvaluationResults) -> list[dict[str, Any]]:
    """Return the chosen threshold with its effect; empty without one."""
    chosen = found.get("chosen_exit", {"threshold": None})
    return [] if chosen["threshold"] is None else [chosen]


def _of_chosen_exit(chosen: dict[str, Any], found: EvaluationResults) -> str:
    from scipy.special import betaincinv

    on, within = chosen["chosen_on"], chosen["within"]
    samples, lost = on["samples"], on["lost"]
    if on["top1"] is None:
        limit = f"changes at most {within:g} % of the decisions on {samples:,} unlabelled samples"
        became, bound, unit, give = "changed", "changes of more than", "%", "give"
    else:
        points = "1 point" if within == 1 else f"{within:g} points"
        limit = f"loses at most {points} on {samples:,} held-out training samples"
        became, bound, unit, give = "became wrong", "losses above", "points", "hold out"
    if chosen["threshold"] is None:
        return f"no confidence from 0.3 up {limit}"
    # Clopper and Pearson's one-sided bound. The samples also chose the threshold, so unless it is
    # the lowest candidate, the count is that of the most samples that the choice may lose.
    is_lowest = chosen["threshold"] == FINE_THRESHOLDS[0]
    most = lost if is_lowest else max(lost, int(within * samples // 100))
    may = f", and up to {most:,} may" * (most > lost)
    worst = 100 * betaincinv(most + 1, samples - most, 1 - DOUBT) if most < samples else 100
    needed = math.ceil(math.log(DOUBT, 1 - within / 100)) if 0 < within < 100 else 0
    advice = f"; to exclude {within:g} {unit}, {give} at least {needed:,}" * (needed > samples)
    bounded = (
        f"{may}, so only {bound} {worst:.3g} {unit} can be excluded elsewhere "
        f"({100 * (1 - DOUBT):.0f} % confidence){advice}"
    )
    # Samples of the training or evaluation bound nothing elsewhere.
    end = f"; warning: {on['warning']}" if "warning" in on else bounded
    return (
        f"chosen: confidence {chosen['threshold']:.4g}, the lowest of the candidates from 0.3 up "
        f"that {limit}. On {found['split']} it gives {chosen['top1']:.2f} % "
        f"({chosen['top1'] - found['top1']:+.2f} points) at T = {chosen['mean_timesteps']:.3f} on "
        f"average. {lost:,} of the {samples:,} {became}{end}"
    )


def _counts(found: EvaluationResults) -> Section:
    rates, operations, sentences = found["firing_rate"], found["operations"], list[str]()
    if "real_numbers" in found:
        sentences.append("--int8 counts neither operations nor spikes")
    elif operations is None:
        sentences.append("operations are only counted for tetdist's own networks")
    else:
        sentences.append(
            f"{operations['accumulates']:,.0f} accumulates and "
            f"{operations['multiply_accumulates']:,.0f} multiply-accumulates a sample at "
            f"T = {found['timesteps']}; the ReLU network with the same synapses: "
            f"{operations['relu_multiply_accumulates']:,.0f} multiply-accumulates"
        )
    if not rates and "real_numbers" not in found:
        sentences.append("no firing rates: the network has no spiking neurons")
    rate = f"firing rate over {counted(found['timesteps'], 'timestep')}"
    table = [["layer", rate], *([layer, f"{rates[layer]:.4f}"] for layer in rates)]
    panels, layers = [], operations["layers"] if operations else {}
    if rates:
        percent = {layer: [100 * rates[layer]] for layer in rates}
        unit = "spikes per neuron per timestep (%)"
        panels.append(partial(_draw_bars, percent, {"": style.RATE}, rate.capitalize(), unit))
    if layers:
        kinds = {"accumulates": style.TRAIN, "multiply-accumulates": style.WAIT}
        keys = [kind.replace("-", "_") for kind in kinds]
        millions = {name: [one[key] / 1e6 for key in keys] for name, one in layers.items()}
        title = "Synaptic operations"
        panels.append(partial(_draw_bars, millions, kinds, title, "millions a sample"))
    height = 1.5 + 0.22 * max(len(rates), len(layers))
    tables, title = [table] if rates else [], "Firing rates and operations"
    return Section(title, sentences, tables, panels, height=height)


def _energy(energy: dict[str, Any]) -> Section:
    rate, even = energy["spike_rate"], energy["break_even_rate"]
    if rate is None:
        known = "no spikes reach a synapse"
    elif 0 < even < 1:
        side = "below" if energy["wins_below"] else "above"
        does = "does" if (rate < even) == energy["wins_below"] else "does not"
        known = f"Counting memory (table below), the spiking network needs a spike rate {side} "
        known += f"{100 * even:.3g} % to beat the ReLU network; at its {100 * rate:.3g} % it {does}"
    else:
        known = f"Counting memory, the spiking network takes {'less' if even else 'more'} energy "
        known += f"than the ReLU network at any spike rate (here {100 * rate:.3g} %)"
    assumed, changed = (
        ", ".join(f"{key}={energy['constants'][key]}" for key in keys)
        for keys in (ASSUMED, energy["changed"])
    )
    sentences = [
        f"{known}; the ReLU network's activations have {counted(energy['activation_bits'], 'bit')}",
        f"energy is an estimate; assumed: {assumed}; other constants: arXiv 2409.08290v4 (22 nm), "
        "fitted to it for weights, membranes and products, and Horowitz (45 nm, 32-bit floating "
        "point) for arithmetic only" + (f"; changed by --energy: {changed}" if changed else ""),
    ]
    table = [["energy, uJ a sample", *NETWORKS.values()]] + [
        [cause, *(f"{energy[network]['pj'][cause] / 1e6:.4g}" for network in NETWORKS)]
        for cause in energy["relu"]["pj"]
    ]
    only = {key: f"{pj / 1e6:.4g}" for key, pj in energy["arithmetic_only_pj"].items()}
    table.append(["arithmetic only, fp32, 45 nm", only["spiking"], "-", only["relu"]])
    causes = dict(zip(list(energy["relu"]["pj"])[:-1], style.SERIES, strict=False))
    bars = {n: [energy[key]["pj"][cause] / 1e6 for cause in causes] for key, n in NETWORKS.items()}
    draw = partial(_draw_bars, bars, causes, "Energy with memory", "uJ a sample")
    return Section("Energy", sentences, [table], [draw], height=2.5)


def _classes(found: EvaluationResults) -> Section:
    """Return the classes with samples; of many only those of lowest recall."""
    rows, head = [row for row in found["per_class"] if row["samples"]], "class"
    if len(rows) > SHOWN_CLASSES:
        rows = sorted(rows, key=lambda row: row["recall"])[:SHOWN_CLASSES]
        head = f"the {SHOWN_CLASSES} classes of lowest recall"
    table = [[head, "samples", "recall %", "precision %", "most often mistaken for"]] + [
        [
            row["class"],
            str(row["samples"]),
            number(row["recall"], ".2f"),
            number(row["precision"], ".2f"),
            f"{row['mistaken_for']} ({row['mistaken']})" if row["mistaken"] else "-",
        ]
        for row in rows
    ]
    return Section("Classes", [], [table], [partial(_draw_confusion, found)], 9, 7.5)


def _draw_timesteps(found: EvaluationResults, axis: Any) -> None:
    shown, trained = found["reported_timesteps"], found["trained_timesteps"]
    top1 = [found["per_timestep_top1"][t - 1] for t in shown]
    axis.plot(shown, top1, "o-", color=style.VALIDATION, label="top-1")
    axis.axvline(trained, color=style.QUIET, linestyle=":", label=f"training T: {trained}")
    axis.set_xlabel("timesteps T")
    axis.xaxis.get_major_locator().set_params(integer=True)
    style.finish(axis, "Accuracy by timesteps", style.ACCURACY)


def _draw_exits(found: EvaluationResults, axis: Any) -> None:
    spent, top1 = ([one[key] for one in found["early_exit"]] for key in ("mean_timesteps", "top1"))
    axis.plot(spent, top1, "o-", color=style.RATE, label="by confidence")
    whole = found["per_timestep_top1"][: found["timesteps"]]
    axis.plot(range(1, len(whole) + 1), whole, "--", color=style.QUIET, label="same T for all")
    for point in _chosen_point(found):
        at, label = (point["mean_timesteps"], point["top1"]), f"chosen: {point['threshold']:.4g}"
        axis.plot(*at, "*", markersize=14, color=style.TRAIN, label=label)
    axis.set_xlabel("average timesteps a sample")
    style.finish(axis, "Early exit", style.ACCURACY)


def _draw_bars(
    rows: dict[str, list[float]], kinds: dict[str, str], title: str, unit: str, axis: Any
) -> None:
    """Draw a stacked bar for each row, the first one at the top; ``kinds`` have their colours."""
    starts = [0.0] * len(rows)
    for k, (label, colour) in enumerate(kinds.items()):
        widths = [values[k] for values in rows.values()]
        axis.barh(range(len(rows)), widths, left=starts, color=colour, label=label, height=0.75)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axis.set_yticks(range(len(rows)), labels=list(rows))
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.tick_params(labelsize=8)
    axis.grid(axis="x", color="#E4E4E4", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    if "" not in kinds:
        axis.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    axis.set_title(title, loc="left", fontsize=11)
    axis.set_xlabel(unit, fontsize=9)


def _draw_confusion(found: EvaluationResults, axis: Any) -> None:
    names = found["classes"]
    fractions = [[count / max(sum(row), 1) for count in row] for row in found["confusion"]]
    axis.imshow(fractions, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    if len(names) <= NAMED_CLASSES:
        axis.set_xticks(range(len(names)), labels=names, rotation=90, fontsize=8)
        axis.set_yticks(range(len(names)), labels=names, fontsize=8)
    axis.set_xlabel("predicted", fontsize=9)
    axis.set_ylabel("true", fontsize=9)
    axis.set_title(f"Confusion at T = {found['timesteps']}", loc="left", fontsize=11)
