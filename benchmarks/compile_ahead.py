"""Runs a module on a simulated GPU, so that Triton compiles what it launches: fills the cache.

    python -m benchmarks.compile_ahead --record kernels.jsonl pytest -q -k cuda tests/ops

For sm_90; needs no GPU. Whatever the module's exit code, this exits with 0 if the module ran to its
end, since only the compilation matters. A module that needs a real GPU (graphs, measured times)
fails at that point, with everything before it compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

# Allows running from a checkout without installation.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))


def main(argv: list[str] | None = None) -> int:
    """Returns 0 and prints a line with the number of kernels and the module's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help="appends a line of JSON for each kernel")
    parser.add_argument("module", help="one whose main() reads sys.argv")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)
    from tests.fake_cuda.compiling import Compilation, compiling

    found: list[Compilation] = []

    def keep(kernel: Compilation) -> None:
        found.append(kernel)
        if args.record is not None:
            with args.record.open("a") as file:
                file.write(json.dumps(asdict(kernel)) + "\n")

    sys.argv = [args.module, *args.arguments]
    code: object = 0
    with compiling(keep):
        try:
            code = import_module(args.module).main()
        except SystemExit as end:
            code = end.code
        except Exception:
            traceback.print_exc()
            code = "an exception"
    compiled = [kernel.seconds for kernel in found if not kernel.cached]
    print(
        f"compiled {len(compiled)} kernels in {sum(compiled):.0f} s, {len(found) - len(compiled)} "
        f"from the cache; {args.module} ended with {code or 0}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
