"""Low-level ops of afd, torch.ops.afd.*, each with several backends. Users import afd.ops."""

from afd_kernels.adaln import op as _adaln  # noqa: F401 (registers the op)
from afd_kernels.block_attention import op as _block_attention  # noqa: F401 (registers the op)
from afd_kernels.forward_noise import op as _forward_noise  # noqa: F401 (registers the op)
from afd_kernels.nft_loss import op as _nft_loss  # noqa: F401 (registers the op)
from afd_kernels.qk_norm_rope import op as _qk_norm_rope  # noqa: F401 (registers the op)

__all__: list[str] = []
