"""Sets up what is missing, then starts what was asked for: `setup.py run|test|binary|wheel [ARGS]`.

Every `build/run` passes through here, so a finished setup must be recognised fast: each step leaves
a stamp (a hash of what went into it) in .venv, and only if one differs is the rest imported.
"""

import os
import sys

from common import VENV, Stop, expected_stamps, outdated, say


def main() -> None:
    command, arguments = sys.argv[1], sys.argv[2:]
    kind = "run" if command == "run" else "dev"
    if outdated(expected_stamps(kind)):
        import environment

        environment.set_up(kind)
        say("done; the first start takes a few seconds")
    if command == "run":
        if arguments and arguments[0] in ("--cuda", "--vulkan"):
            import gpu

            choice, arguments = gpu.read_options(arguments)
            gpu.install(choice)
        os.execv(VENV / "bin/pinaivu", ["pinaivu", *(arguments or ["serve"])])  # noqa: S606
    import tasks

    tasks.RUN[command](arguments)


if __name__ == "__main__":
    try:
        main()
    except Stop as stop:
        print(*stop.shown, sep="\n", end="\n" if stop.shown else "", file=sys.stderr)
        say(str(stop))
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted; run it again to go on")
        sys.exit(130)
