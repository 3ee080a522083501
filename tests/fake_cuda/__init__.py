"""A simulated CUDA device: tensors on cuda:0 with real values, for a torch that has no CUDA.

`fake_cuda()` makes `device="cuda"`, `.to("cuda")`, `Module.to` and `torch.cuda` work. Values are
computed on the CPU, so whole paths run and their numbers can be compared with the CPU's; but as on
a GPU, an op that is given tensors of both devices raises, so does a generator of the other device,
and every place where the host would wait for the device (`.item()`, `float(x)`, `if x`, a copy
without pinned memory, `nonzero`, `synchronize`) is counted with its line of code. Our ops also run
their CUDA host code: the libraries' calls and the Triton launches, whose every tensor must be on
the device.
"""

from tests.fake_cuda.driver import fake_cuda
from tests.fake_cuda.machine import FakeCuda

__all__ = ["FakeCuda", "fake_cuda"]
