"""Results of an evaluation as text, and as an HTML page with the same text and plots."""

import base64
import html
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from tetdist.apps.reports import style
from tetdist.evaluation.decisions import ExitPoint
from tetdist.evaluation.early_exit import DOUBT, ChosenExit, ExitChoice
from tetdist.evaluation.energy import ASSUMED, Estimator
from tetdist.evaluation.results import EvalResult
from tetdist.tables import aligned, as_html, number
from tetdist.wording import and_more, counted

SHOWN_CLASSES, NAMED_CLASSES = 20, 50  # most rows of the table, and names of the confusion matrix
NETWORKS = {"spiking": "spiking", "bitmaps": "spikes as bitmaps", "relu": "ReLU"}


class Section(NamedTuple):
    """Part of the results: sentences, tables, and panels with their size in inches."""

    title: str
    sentences: Sequence[str]
    tables: Sequence[list[list[str]]]  # each with its head as the first row
    panels: Sequence[Callable[[Any], None]]  # each draws on an axis of matplotlib
    width: float = 6.5  # of a panel
    height: float = 4.5


def as_text(result: EvalResult) -> str:
    """Return the results as text for a terminal."""
    parts = [heading(result), *(f"  {line}" for line in headlines(result))]
    for section in sections(result):
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


def html_page(result: EvalResult) -> str:
    """Return the page with embedded plots, without external resources or scripts."""
    parts = [f"<h1>{html.escape(heading(result))}</h1>"]
    parts += [f"<p>{html.escape(line)}.</p>" for line in headlines(result)]
    for section in sections(result):
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
    title = html.escape(f"{result.subject.model}: {result.evaluation.top1:.2f} %")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def heading(result: EvalResult) -> str:
    """Name the network, the data, and their classes if these are not all of the network's."""
    subject, known, subset = result.subject, len(result.classes), ""
    averaged = f" ({subject.averaged})" if subject.averaged else ""
    of_split = f" of the split {subject.data_split}" if subject.data_split else ""
    if present := subject.subset:
        names = f"{', '.join(present[:5])}{and_more(present, 5)}"
        subset = f", with {len(present)} of the {known} classes of the network ({names}); it "
        subset += f"chose among all {known}"
    return (
        f"{subject.checkpoint}: {subject.model}, step {subject.step}{averaged}, "
        f"{counted(result.evaluation.samples, 'sample')} of {subject.split}{of_split}{subset}"
    )


def headlines(result: EvalResult) -> list[str]:
    """Return the sentences on the accuracy, the published one, and that in real numbers."""
    subject, evaluation, numbers = result.subject, result.evaluation, result.real_numbers
    top5 = f", top-5 {evaluation.top5:.2f} %" if len(result.classes) > 5 else ""
    lines = [
        f"top-1 {evaluation.top1:.2f} %{top5}, loss {evaluation.loss:.4f} at "
        f"T={evaluation.timesteps}; trained at T={subject.trained_timesteps}",
        *([_of_published(subject.published)] if subject.published else []),
        f"All numbers below are at T={evaluation.timesteps} unless a T is given",
    ]
    if numbers is not None:
        lines.append(
            f"in integers (--int8); in real numbers top-1 {numbers.top1:.2f} %; different "
            f"decisions: {numbers.changed:,} of {evaluation.samples:,}"
        )
    return lines


def _of_published(claim: dict[str, Any]) -> str:
    """Return the sentence on what the authors of converted weights claim."""
    top1 = "no top-1" if claim["top1"] is None else f"top-1 {claim['top1']:.2f} %"
    place = f"for {claim['data']} at T={claim['timesteps']} ({claim['page']})"
    return f"published: {top1} {place}. {claim['known']}".rstrip(".")


def sections(result: EvalResult) -> list[Section]:
    """Return the results in order."""
    energy = [_energy(result.energy)] if result.energy else []
    return [_accuracy(result), _early_exit(result), _counts(result), *energy, _classes(result)]


def _accuracy(result: EvalResult) -> Section:
    evaluation = result.evaluation
    columns = {
        "top-1 %": (evaluation.per_timestep_top1, ".2f"),
        "top-5 %": (evaluation.per_timestep_top5, ".2f"),
        "loss": (evaluation.per_timestep_loss, ".4f"),
    }
    if len(result.classes) <= 5:
        del columns["top-5 %"]
    by_timesteps = [["T", *columns]] + [
        [str(t), *(number(values[t - 1], spec) for values, spec in columns.values())]
        for t in result.subject.reported_timesteps
    ]
    return Section("Accuracy at each T", [], [by_timesteps], [partial(_draw_timesteps, result)])


def _early_exit(result: EvalResult) -> Section:
    if result.early_exit is None:
        sentence = "no early exit: the network is not causal, so its first logits depend on later "
        return Section("Early exit", [f"{sentence}timesteps"], [], [])
    rows = {
        point.threshold: [f"{point.threshold:.4g}", *_exit_cells(point)]
        for point in result.early_exit
    }
    sentences = [
        "early exit: a sample is decided at the first timestep at which the softmax of its "
        "time-mean reaches the confidence, or else at T"
    ]
    if (chosen := result.chosen_exit) is not None:
        sentences.append(_of_chosen_exit(chosen, result.subject.split, result.evaluation.top1))
        if (threshold := chosen.choice.threshold) < math.inf:
            rows[threshold] = [f"{threshold:.4g} (chosen)", *_exit_cells(chosen)]
    if (measured := result.measured_exit) is not None:
        sentences.append(
            f"measured: {measured.images_per_s:.1f} images/s, {measured.ratio:.2f} times the "
            f"{measured.whole_pass_images_per_s:.1f} of whole passes, at batch "
            f"{measured.batch} and {counted(measured.threads, 'thread')}; "
            f"{measured.top1:.2f} % at T = {measured.mean_timesteps:.3f} on average; "
            f"{counted(measured.differing, 'decision')} unlike the whole pass's, "
            f"{measured.near} of them within 1e-5 of the threshold"
        )
    table = [["confidence", "top-1 %", "mean T"], *(row for _, row in sorted(rows.items()))]
    return Section("Early exit", sentences, [table], [partial(_draw_exits, result)])


def _exit_cells(point: ExitPoint | ChosenExit) -> list[str]:
    return [f"{point.top1:.2f}", f"{point.mean_timesteps:.3f}"]


def _of_chosen_exit(chosen: ChosenExit, split: str, top1: float) -> str:
    """Return the sentences on a chosen threshold; ``top1`` is the accuracy without early exit."""
    choice = chosen.choice
    if choice.top1 is None:
        limit = f"changes at most {choice.within:g} % of the decisions on "
        limit += f"{choice.samples:,} unlabelled samples"
    else:
        points = "1 point" if choice.within == 1 else f"{choice.within:g} points"
        limit = f"loses at most {points} on {choice.samples:,} held-out training samples"
    if math.isinf(choice.threshold):
        return f"no confidence from 0.3 up {limit}"
    warning = f"Warning: {choice.warning}"
    return (
        f"chosen: confidence {choice.threshold:.4g}, the lowest of the candidates from 0.3 up that "
        f"{limit}. On {split} it gives {chosen.top1:.2f} % ({chosen.top1 - top1:+.2f} points) at "
        f"T = {chosen.mean_timesteps:.3f} on average. "
        # Samples of the training or evaluation bound nothing elsewhere.
        f"{_losses(choice)}. {warning if choice.warning else _loss_elsewhere(choice)}"
    )


def _losses(choice: ExitChoice) -> str:
    """Return the sentence on the samples of the choice that early exit decides otherwise."""
    became = "changed" if choice.top1 is None else "became wrong"
    most = f", and up to {choice.most_lost:,} may" if choice.most_lost > choice.lost else ""
    return f"{choice.lost:,} of the {choice.samples:,} {became}{most}"


def _loss_elsewhere(choice: ExitChoice) -> str:
    """Return the sentence on other samples than those of the choice."""
    became = "change" if choice.top1 is None else "become wrong"
    needed, more = choice.samples_needed, ""
    if needed > choice.samples:
        more = f"; to show at most {choice.within:g} %, choose on at least {needed:,} samples"
    confidence = f"{100 * (1 - DOUBT):.0f} % confidence"
    return f"Elsewhere up to {choice.loss_bound:.3g} % may {became} ({confidence}){more}"


def _counts(result: EvalResult) -> Section:
    rates, timesteps = result.evaluation.firing_rate, result.evaluation.timesteps
    operations, sentences = result.operations, list[str]()
    if result.real_numbers:
        sentences.append("--int8 counts neither operations nor spikes")
    elif operations is None:
        sentences.append("operations are only counted for tetdist's own networks")
    else:
        sentences.append(
            f"{operations.accumulates:,.0f} accumulates and "
            f"{operations.multiply_accumulates:,.0f} multiply-accumulates a sample at "
            f"T = {timesteps}; the ReLU network with the same synapses: "
            f"{operations.relu_multiply_accumulates:,.0f} multiply-accumulates"
        )
    if not rates and not result.real_numbers:
        sentences.append("no firing rates: the network has no spiking neurons")
    rate = f"firing rate over {counted(timesteps, 'timestep')}"
    table = [["layer", rate], *([layer, f"{rates[layer]:.4f}"] for layer in rates)]
    panels, layers = [], operations.layers if operations else {}
    if rates:
        percent = {layer: [100 * rates[layer]] for layer in rates}
        unit = "spikes per neuron per timestep (%)"
        panels.append(partial(_draw_bars, percent, {"": style.RATE}, rate.capitalize(), unit))
    if layers:
        kinds = {"accumulates": style.TRAIN, "multiply-accumulates": style.WAIT}
        millions = {
            name: [layer.accumulates / 1e6, layer.multiply_accumulates / 1e6]
            for name, layer in layers.items()
        }
        title = "Synaptic operations"
        panels.append(partial(_draw_bars, millions, kinds, title, "millions a sample"))
    height = 1.5 + 0.22 * max(len(rates), len(layers))
    tables, title = [table] if rates else [], "Firing rates and operations"
    return Section(title, sentences, tables, panels, height=height)


def _energy(energy: Estimator) -> Section:
    rate, (even, wins_below) = energy.spike_rate, energy.break_even()
    if rate is None or even is None:
        known = "no spikes reach a synapse"
    elif 0 < even < 1:
        side = "below" if wins_below else "above"
        does = "does" if (rate < even) == wins_below else "does not"
        known = f"Counting memory (table below), the spiking network needs a spike rate {side} "
        known += f"{100 * even:.3g} % to beat the ReLU network; at its {100 * rate:.3g} % it {does}"
    else:
        known = f"Counting memory, the spiking network takes {'less' if even else 'more'} energy "
        known += f"than the ReLU network at any spike rate (here {100 * rate:.3g} %)"
    assumed, changed = (
        ", ".join(f"{key}={getattr(energy.constants, key)}" for key in keys)
        for keys in (ASSUMED, sorted(energy.constants.model_fields_set))
    )
    sentences = [
        f"{known}; the ReLU network's activations have {counted(energy.activation_bits, 'bit')}",
        f"energy is an estimate; assumed: {assumed}; other constants: arXiv 2409.08290v4 (22 nm), "
        "fitted to it for weights, membranes and products, and Horowitz (45 nm, 32-bit floating "
        "point) for arithmetic only" + (f"; changed by --energy: {changed}" if changed else ""),
    ]
    pj = {network: use.pj(energy.constants) for network, use in energy.uses().items()}
    table = [["energy, uJ a sample", *NETWORKS.values()]] + [
        [cause, *(f"{pj[network][cause] / 1e6:.4g}" for network in NETWORKS)]
        for cause in pj["relu"]
    ]
    only = {network: f"{total / 1e6:.4g}" for network, total in energy.arithmetic_only().items()}
    table.append(["arithmetic only, fp32, 45 nm", only["spiking"], "-", only["relu"]])
    causes = dict(zip(list(pj["relu"])[:-1], style.SERIES, strict=False))
    bars = {title: [pj[key][c] / 1e6 for c in causes] for key, title in NETWORKS.items()}
    draw = partial(_draw_bars, bars, causes, "Energy with memory", "uJ a sample")
    return Section("Energy", sentences, [table], [draw], height=2.5)


def _classes(result: EvalResult) -> Section:
    """Return the classes with samples; of many only those of lowest recall."""
    rows, head = [row for row in result.per_class if row.samples], "class"
    if len(rows) > SHOWN_CLASSES:
        rows = sorted(rows, key=lambda row: row.recall or 0.0)[:SHOWN_CLASSES]
        head = f"the {SHOWN_CLASSES} classes of lowest recall"
    table = [[head, "samples", "recall %", "precision %", "most often mistaken for"]] + [
        [
            row.name,
            str(row.samples),
            number(row.recall, ".2f"),
            number(row.precision, ".2f"),
            f"{row.mistaken_for} ({row.mistaken})" if row.mistaken else "-",
        ]
        for row in rows
    ]
    return Section("Classes", [], [table], [partial(_draw_confusion, result)], 9, 7.5)


def _draw_timesteps(result: EvalResult, axis: Any) -> None:
    shown, trained = result.subject.reported_timesteps, result.subject.trained_timesteps
    top1 = [result.evaluation.per_timestep_top1[t - 1] for t in shown]
    axis.plot(shown, top1, "o-", color=style.VALIDATION, label="top-1")
    axis.axvline(trained, color=style.QUIET, linestyle=":", label=f"training T: {trained}")
    axis.set_xlabel("timesteps T")
    axis.xaxis.get_major_locator().set_params(integer=True)
    style.finish(axis, "Accuracy by timesteps", style.ACCURACY)


def _draw_exits(result: EvalResult, axis: Any) -> None:
    points, evaluation, chosen = result.early_exit or [], result.evaluation, result.chosen_exit
    spent, top1 = [point.mean_timesteps for point in points], [point.top1 for point in points]
    axis.plot(spent, top1, "o-", color=style.RATE, label="by confidence")
    whole = evaluation.per_timestep_top1[: evaluation.timesteps]
    axis.plot(range(1, len(whole) + 1), whole, "--", color=style.QUIET, label="same T for all")
    if chosen is not None and (threshold := chosen.choice.threshold) < math.inf:
        at, label = (chosen.mean_timesteps, chosen.top1), f"chosen: {threshold:.4g}"
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


def _draw_confusion(result: EvalResult, axis: Any) -> None:
    names = result.classes
    fractions = [[count / max(sum(row), 1) for count in row] for row in result.confusion]
    axis.imshow(fractions, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    if len(names) <= NAMED_CLASSES:
        axis.set_xticks(range(len(names)), labels=names, rotation=90, fontsize=8)
        axis.set_yticks(range(len(names)), labels=names, fontsize=8)
    axis.set_xlabel("predicted", fontsize=9)
    axis.set_ylabel("true", fontsize=9)
    axis.set_title(f"Confusion at T = {result.evaluation.timesteps}", loc="left", fontsize=11)
