"""The causal Wan student as diffusers' classes: model, rolling KV cache, scheduler and pipeline.

    pipe = CausalWanPipeline.from_pretrained(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        transformer=CausalWanTransformer3DModel.from_pretrained("exported/whole"),
        scheduler=SelfForcingScheduler(),
    )
    video = pipe("a cat", generator=torch.Generator().manual_seed(0)).frames

The network is `afd.models.wan.network.CausalWan`, and the pipeline's latents are those of
`afd.rollout`. The cache follows diffusers' proposal for autoregressive Wan models
(huggingface/diffusers issue 12600, pull requests 13569 and 13681, not yet merged): an object passed
as `attention_kwargs={"kv_cache": cache}` with `frame_offset`, which appends or overwrites its
newest chunk.
"""

from afd.extras import need

need("afd.integrations.diffusers", "diffusers")

from afd.integrations.diffusers.cache import RollingKVCache  # noqa: E402
from afd.integrations.diffusers.model import CausalWanTransformer3DModel  # noqa: E402
from afd.integrations.diffusers.pipeline import CausalWanPipeline  # noqa: E402
from afd.integrations.diffusers.scheduler import SelfForcingScheduler  # noqa: E402

__all__ = [
    "CausalWanPipeline",
    "CausalWanTransformer3DModel",
    "RollingKVCache",
    "SelfForcingScheduler",
]
