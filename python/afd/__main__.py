"""The `afd` command, `python -m afd`, and `torchrun --nproc-per-node N -m afd train CONFIG`."""

import sys

from afd import extras


def main() -> int:
    """Run one command; returns the exit code."""
    # Before any other module: the other project's files may stand in the place of ours.
    problem = extras.stranger()
    if problem is not None:
        print(f"afd: error: {problem}", file=sys.stderr)
        return 2
    from afd.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
