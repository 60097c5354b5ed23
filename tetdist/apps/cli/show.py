"""Draw what a network does with one sample, as a PNG and a GIF.

    python tools/show.py runs/sew34_t4 --sample 7
    python tools/show.py tetdist:quickstart --data data/digits --sample 700 --output seven

Shown are the input, spikes of three layers, the answer and its confidence after each timestep, and
which part of the input speaks for the answer.
"""

import argparse
from pathlib import Path

from tetdist.apps.cli.common import add_checkpoint, documented_parser, run_command
from tetdist.apps.reports.evaluation_places import check_own_data
from tetdist.config.flags import add_import
from tetdist.storage import files, hub


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = documented_parser("show", __doc__)
    add = parser.add_argument
    add_checkpoint(parser)
    add("--sample", metavar="K", type=int, default=0, help="number of the sample (default: 0)")
    add("--best", action="store_true", help="use a run folder's best checkpoint")
    add("--data", metavar="ROOT", help="folder that holds val/; default: training's")
    text = "split of the sample (default: val, or without one what the run held out)"
    add("--split", help=text)
    text = "PNG and GIF to write, one name for both, or a folder for sample-K (default: here)"
    add("--output", metavar="PATH", type=Path, help=text)
    add_import(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_command(lambda: show(options))


def show(options: argparse.Namespace) -> None:
    folder = hub.check_source(options.checkpoint)  # before torch is imported
    if not options.data:
        check_own_data(folder)
    if (output := options.output or Path()).is_dir():
        output /= f"sample-{options.sample}"
    output = output.with_suffix("") if output.suffix in (".png", ".gif") else output
    png, gif = (output.with_name(f"{output.name}.{kind}") for kind in ("png", "gif"))
    for file in (png, gif):
        files.check_writable("--output", file)
    from tetdist.apps.reports import sample_plot

    seen = sample_plot.see(
        options.checkpoint,
        "best" if options.best else "last",
        options.sample,
        options.split,
        options.data,
        options.imports,
    )
    print(seen.title)
    for t, probabilities in enumerate(seen.probabilities, start=1):
        answer = int(probabilities.argmax())
        print(f"  t={t}  {seen.classes[answer]}  {100 * probabilities[answer]:.1f} %")
    sample_plot.draw(seen, png, gif)
    print(f"wrote {png} and {gif}")
