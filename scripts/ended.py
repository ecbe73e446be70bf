"""Let the scripts end with the exit codes and sentences of `mae-jax`."""

import signal
import sys
from collections.abc import Callable

from mae_jax.errors import StatedError


def ended(main: Callable[[], int | None]) -> int:
    """Run a script and return its exit code: 1 with a sentence for a stated failure, 130 for Ctrl-C, 143 for SIGTERM.

    SIGTERM is raised as SystemExit, so that processes which the script has started end with it.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return main() or 0
    except StatedError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
