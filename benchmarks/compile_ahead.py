"""Runs a module on a simulated GPU, so that Triton compiles what it launches: fills the cache.

    python -m benchmarks.compile_ahead --record kernels.jsonl pytest -q -k cuda tests/ops

For sm_90; needs no GPU. Whatever the module exits with, this exits with 0 if it got to its end:
what was compiled is what counts here. A module that needs what only a GPU has (graphs, measured
times) fails there and has compiled what came before.
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

# So that it runs from a checkout where nothing is installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))


def main(argv: list[str] | None = None) -> int:
    """0, and a line that counts the kernels; the module's own exit goes into that line."""
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
