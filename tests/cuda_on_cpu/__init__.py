"""The CUDA kernels on a CPU: the unchanged sources of csrc/cuda, compiled by a host compiler.

`shim/` replaces CUDA's headers and runs the threads of a block as fibers, first to last or
last to first. It refuses what a GPU refuses or leaves undefined: misaligned accesses, memory
outside a tensor, barriers and shuffles that not all threads reach, lanes that a mask does not name,
writes to what was read through the read-only cache, launches beyond the limits. `rewrite.py` spells
launches and shared memory in C++, `build.py` compiles, `device.py` runs our ops on the result.

What it cannot show: speed, the few ulps of approximate functions (rsqrtf), and races that need more
than an order of threads to appear; the last are ThreadSanitizer's (`make soak`).
"""
