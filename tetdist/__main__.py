"""`python -m tetdist COMMAND`, where `tetdist COMMAND` is not on the PATH."""

import sys

from tetdist_command import main

if __name__ == "__main__":
    sys.exit(main())
