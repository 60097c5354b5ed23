"""The one exception that entry points turn into a sentence instead of a traceback."""

import errno


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend.

    Its text is one clear sentence that names the key, file or step and the way out. Entry points
    print it and exit with status 2; anything else that is raised is a fault of ours and keeps its
    traceback.
    """


def way_out(error: BaseException) -> str:
    """What a person can do about a file that could not be written."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "give yourself permission to write there, or choose another runs_dir=..."
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "make room, or choose another runs_dir=..."
    return "mend that, or choose another runs_dir=..."


class Stopped(Exception):
    """A signal ended the run after a saved step; the same command continues it."""
