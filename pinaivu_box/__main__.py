"""`python -m pinaivu_box`, `pinaivu` and the entry point of the executable.

`engine` and `sandbox` are child processes, which only the box starts.  They are no commands, so
that they start without the command line.
"""

import sys

from pinaivu_box import startup


def main() -> None:
    startup.begin()
    match sys.argv[1:]:
        case ["engine"]:
            from pinaivu_box.engine.worker import main as run
        case ["sandbox"]:
            from pinaivu_box.sandbox import main as run
        case _:
            from pinaivu_box.cli.main import main as run
    run()


if __name__ == "__main__":
    main()
