"""Report of a search: all candidates, how far they came, and the winner's final result."""

import math
from pathlib import Path
from typing import Any

from tetdist.apps.reports import style
from tetdist.apps.studies import report
from tetdist.apps.studies.figures import colours
from tetdist.apps.studies.numbers import distinct, run_environment, spread
from tetdist.apps.studies.plan import is_trained, lines
from tetdist.apps.studies.search import FINAL, Rung, Search, Standing
from tetdist.tables import aligned, markdown
from tetdist.wording import counted

_UNITS = {"top1": "top-1, %", "loss": "cross-entropy"}


def write(search: Search, standing: Standing, file: Path, command: str) -> None:
    """Write the search's page, with figure and numbers beside it."""
    text = page(search, standing, file.stem, command)
    report.put(file, text, draw(search, standing), as_dict(search, standing))


def candidates_as_text(search: Search) -> str:
    """Return the candidates and their values as a table."""
    head = ["", *search.study.search.over]
    rows = [[name, *map(_shown, values.values())] for name, values in search.candidates.items()]
    return aligned([head, *rows])


def page(search: Search, standing: Standing, name: str, command: str) -> str:
    """Return the page in Markdown; figure and numbers are beside it, by this name."""
    study = search.study
    parts = [
        f"# {study.title}",
        study.question.strip(),
        f"`{command}`",
        f"Budget: {search.budget()}.",
        judged_on(search, standing),
        table(search, standing),
        f"![{study.title}]({name}.png)",
        at_the_edge(search, standing),
        conclusion(search, standing),
        f"Every number is in [{name}.json]({name}.json).",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def ranked(standing: Standing) -> list[str]:
    """Return all candidates, ordered by the rung that they reached, then by metric."""
    return list(dict.fromkeys(one for rung in reversed(standing.rungs) for one in rung.ranked))


def table(search: Search, standing: Standing) -> str:
    """Return the table of candidates: metric at every rung, and where each was dropped."""
    study = search.study.search
    head = ["", *(f"`{key}`" for key in study.over)]
    head += [f"epoch {epochs}" for epochs in study.rungs]
    rows = []
    for candidate in ranked(standing):
        reached = [rung for rung in standing.rungs if candidate in rung.scores]
        cells = [_score(rung, candidate) for rung in reached]
        cells += [""] * (len(study.rungs) - len(reached))
        row = [candidate, *map(_shown, search.candidates[candidate].values()), *cells]
        rows.append([*row, _outcome(standing, candidate, reached[-1])])
    unit = _UNITS[study.metric]
    over = f"mean ± standard deviation over {counted(len(search.study.seeds), 'seed')}"
    title = f"On held-out samples, {unit}" + (f", {over}:" if len(search.study.seeds) > 1 else ":")
    return f"{title}\n\n{markdown([*head, ''], rows, numbers=True)}"


def _score(rung: Rung, candidate: str) -> str:
    known = [score for score in rung.scores[candidate] if score is not None]
    if not known:
        return ""
    return str(spread(known)) if rung.metric == "top1" else f"{rung.mean(candidate):.4f}"


def _outcome(standing: Standing, candidate: str, last: Rung) -> str:
    if candidate == standing.winner:
        return "**chosen**"
    if not last.scores[candidate]:
        return f"not finite before epoch {last.epochs}"
    if last is standing.rungs[-1] and standing.winner is None:
        return "to be compared"
    return f"dropped at epoch {last.epochs}"


def judged_on(search: Search, standing: Standing) -> str:
    """Describe the data on which candidates were trained and compared, and the uncertainty."""
    share = search.study.search.held_out
    first = standing.rungs[0].ranked[0]
    evaluations = lines(search.run(first, search.study.seeds[0], standing.rungs[0].epochs), "val")
    text = (
        f"A fraction of {share:.3g} of each class's training samples is held out; candidates are "
        "trained on the rest and evaluated on these samples"
    )
    if evaluations:
        samples, top1 = evaluations[-1]["samples"], evaluations[-1]["top1"] / 100
        error = 100 * math.sqrt(top1 * (1 - top1) / samples)
        text += (
            f" ({samples:,}); the standard error of an accuracy of {100 * top1:.0f} % is "
            f"± {error:.2g} points"
        )
    return (
        f"{text}. Each candidate has the schedule of the whole training, cut off at the rung. "
        "There the learning rate is still high, so early rungs favour smaller ones. Only the "
        "final training uses the validation split."
    )


def at_the_edge(search: Search, standing: Standing) -> str:
    """List the keys whose best value is the smallest or largest tried one."""
    if standing.winner is None:
        return ""
    listed = []
    for key, values in search.study.search.axes.items():
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        value = search.candidates[standing.winner][key]
        if len(numbers) == len(values) > 2 and value in (min(numbers), max(numbers)):
            edge = "smallest" if value == min(numbers) else "largest"
            listed.append(
                f"`{key}`: {_shown(value)} is the {edge} value that was tried; a better one may be "
                "outside the range."
            )
    return "\n".join(listed)


def conclusion(search: Search, standing: Standing) -> str:
    """Return the winner's results on the validation split."""
    if standing.winner is None:
        return "**Incomplete**: the same command continues."
    runs = search.final_runs(standing.winner)
    values = search.candidates[standing.winner].items()
    given = ", ".join(f"`{key}={_shown(value)}`" for key, value in values)
    chosen = f"**{standing.winner}** is chosen: {given}."
    done = [run for run in runs if is_trained(run)]
    if len(done) < len(runs):
        return f"{chosen} **Incomplete**: its final training is not finished."
    results = [lines(run, "val")[-1] for run in done]
    top1 = spread([result["top1"] for result in results])
    environment = report.machine(run_environment(done[0]))
    commands = "\n".join(str(run.train_command) for run in done)
    return (
        f"{chosen} Trained again on all training data for {counted(search.epochs, 'epoch')}, with "
        f"{counted(len(runs), 'seed')}: top-1 **{top1}** % on the {results[0]['samples']:,} "
        f"samples of the validation split, evaluated once, after the last epoch. On {environment}."
        f"\n\n```\n{commands}\n```"
    )


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def as_dict(search: Search, standing: Standing) -> dict[str, Any]:
    """Return all numbers of the search, with its file, commands and environments."""
    runs = search.runs_of(standing)
    return {
        "study": search.study.model_dump(mode="json"),
        "overrides": search.more,  # the command line's, in addition to the study's
        "commands": {run.name: str(run.train_command) for run in runs},
        "environments": distinct([run_environment(run) for run in runs]),
        "budget": search.budget(),
        "candidates": search.candidates,
        "rungs": [{"epochs": rung.epochs, "scores": rung.scores} for rung in standing.rungs],
        "chosen": standing.winner,
        "final": {run.name: lines(run, "val")[-1] for run in runs if run.entry == FINAL},
    }


def draw(search: Search, standing: Standing) -> Any:
    """Draw the metric of every candidate by epoch, with a line at each rung."""
    figure = style.new_figure(7.4, 4.8)
    axis = figure.subplots()
    metric, furthest = search.study.search.metric, standing.rungs[-1].epochs
    for candidate, colour in zip(ranked(standing), colours(), strict=False):
        width = 2.4 if candidate == standing.winner else 1.0
        for number, seed in enumerate(search.study.seeds):
            found = lines(search.run(candidate, seed, furthest), "val")
            label = ", ".join([candidate, *map(_shown, search.candidates[candidate].values())])
            axis.plot(
                [line["epoch"] for line in found],
                [float(line[metric]) for line in found],
                color=colour,
                linewidth=width,
                marker="o",
                markersize=3,
                label=None if number else label,
            )
    for epochs in search.study.search.rungs:
        axis.axvline(epochs, color=style.QUIET, linewidth=1, linestyle=(0, (4, 3)))
    axis.set_xlabel("epoch (dashed: rungs)")
    style.finish(axis, search.study.title, f"{_UNITS[metric]}, held out", legend=False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure
