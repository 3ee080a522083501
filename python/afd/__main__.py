"""`python -m afd`, and so `torchrun --nproc-per-node N -m afd train CONFIG.yaml`."""

import sys

from afd.cli import main

if __name__ == "__main__":
    sys.exit(main())
