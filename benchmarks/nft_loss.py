"""The DiffusionNFT loss, forward and backward: the official formula against afd.ops.nft_loss.

    python -m benchmarks.nft_loss                        # a table within a minute
    python -m benchmarks.nft_loss --out runs/bench       # and its JSON
    python -m benchmarks.nft_loss --compare old/nft_loss_table.json
    python -m benchmarks.nft_loss --all                  # every weighting, dtype, batch and noise
    python -m benchmarks.nft_loss --all --batch 2 --plot

The table has a row per provider at 480x832 with the largest batch that fits: time, the machine's
floor, memory, and the gradient's error against float64 (loss_table.py). It writes nothing unless
`--out` is given.

With `--all` every provider is compared with the float64 formula on inputs it is timed on; one that
disagrees is not timed and fails the run. Each is timed with the noise given, and with the noise
drawn (eager, compile) or regenerated from seeds (ours) in the call; the difference is printed
separately. Eager's time includes everything that our single call replaces: noising and metrics.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Allows running from a checkout without installation.
sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))

from benchmarks import loss_table, suite
from benchmarks.nft_case import BOUND, DTYPES, NFT_BETA, PRIOR_WEIGHT, Nft, official_loss

__all__ = ["BOUND", "DTYPES", "NFT_BETA", "PRIOR_WEIGHT", "Nft", "cases", "main", "official_loss"]


def cases(args: Any) -> Iterator[suite.Case]:
    """Every requested weighting, dtype and batch size."""
    for weighting in args.weighting:
        for batch in args.batch:
            for dtype in args.dtype:
                yield Nft(weighting, dtype, batch, tuple(args.shape)).case()


def main(argv: list[str] | None = None) -> None:
    parser = suite.arguments(__doc__.splitlines()[0], DTYPES)
    weightings = ["x0_adaptive", "velocity"]
    parser.add_argument("--weighting", nargs="+", choices=weightings, default=weightings)
    parser.add_argument("--all", action="store_true", help="every case instead of one table")
    parser.add_argument("--compare", type=Path, help="a JSON of an earlier table, shown beside")
    out = parser.parse_args(argv).out
    args = suite.parse(parser, argv)
    if args.all:
        suite.run("nft_loss", cases(args), args)
    else:
        # Written only on request, so that committed results are kept.
        args.out = out
        loss_table.run(args)


if __name__ == "__main__":
    main()
