"""The one exception that entry points turn into a sentence instead of a traceback."""


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend.

    Its text is one clear sentence that names the key, file or step and the way out. Entry points
    print it and exit with status 2; anything else that is raised is a fault of ours and keeps its
    traceback.
    """


class Stopped(Exception):
    """A signal ended the run after a saved step; the same command continues it."""
