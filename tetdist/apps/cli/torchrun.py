"""Start the processes of a command with torchrun, and exit with their status.

    python launch/torchrun.py --nproc-per-node 8 tetdist/train.py --config sew34_t4.yaml

The options are torchrun's. Its own exit status is 1 whatever happened, so that a cluster cannot
tell a run to be started again from a mistake.
"""

from tetdist.apps.cli.common import program, run_command


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: that of the process that failed first, or 128 + n after signal n."""
    return run_command(lambda: _main(arguments))


def _main(arguments: list[str] | None) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parser = run.get_args_parser()
    parser.prog = program("torchrun")
    try:
        run.run(parser.parse_args(arguments))
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        status = failed.get_first_failure()[1].exitcode
        return status if status > 0 else 128 - status
    return 0
