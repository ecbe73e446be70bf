"""`python -m parity`: see command.py."""

import sys

from parity.command import main

if __name__ == "__main__":
    sys.exit(main())
