"""Copy of the code beside the run, which its job executes.

So the submitted code runs, even if the checkout is edited before the job starts days later.
"""

import shutil
from pathlib import Path
from typing import Any

from tetdist.errors import UserError, way_out
from tetdist.storage.files import write_json
from tetdist.tracking import environment

PROJECT = Path(__file__).resolve().parents[3]
# Everything that a job needs, or that a user wants to see beside its results.
PARTS = ("tetdist", "tetdist_command.py", "launch", "configs", "tools", "pyproject.toml")


# Parts of an installed tetdist, which has its configurations in the package; everything beside them
# belongs to other packages.
INSTALLED_PARTS = ("tetdist", "tetdist_command.py")


def take(target: Path, project: Path = PROJECT) -> dict[str, Any]:
    """Copy the code, uncommitted changes included, to a new folder that a job uses as PYTHONPATH.

    ``project`` is a checkout, or the folder into which a wheel was installed. The commit, and
    whether the code differs from it, are returned and written to snapshot.json; snapshot.diff has
    the output of `git diff`.
    """
    try:
        installed = (project / "tetdist" / "configs").is_dir()
        for part in INSTALLED_PARTS if installed else PARTS:
            source = project / part
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
                shutil.copytree(source, target / part, ignore=ignored)
            elif source.is_file():
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target / part)
        git = environment.git_state(project)
        new = [line[3:] for line in git.get("status", "").splitlines() if line.startswith("??")]
        state = {"commit": git.get("commit", ""), "changed": git.get("dirty", False)}
        (target / "snapshot.diff").write_text(git.get("diff", ""))
        write_json(target / "snapshot.json", state | {"untracked": new})
    except (OSError, shutil.Error) as error:
        raise UserError(f"cannot copy the code to {target} ({error}); {way_out(error)}") from error
    return state | {"untracked": new}


def describe(git: dict[str, Any]) -> str:
    """Describe the commit, and whether there are uncommitted changes."""
    if not git["commit"]:
        return "not from a git checkout"
    changed = " with uncommitted changes" if git["changed"] else ""
    return f"commit {git['commit'][:12]}{changed}"
