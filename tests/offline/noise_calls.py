"""The uses of forward_noise and nft_loss that are compiled offline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from afd_kernels.forward_noise.contract import NoiseInputs, NoiseOptions, plan_forward_noise
from afd_kernels.nft_loss.contract import NftInputs, NftOptions, plan_nft_loss
from tests.offline.launches import ONE_EACH, Call, Launch, empty

# The latent of 81 frames at 480x832: [B, C, F, H, W]; 7 chunks of 3 frames.
SHAPE = (2, 16, 21, 60, 104)
CHUNKS = 7
# Arguments with as many elements as a sample.
_STREAMED = ("x0_ptr", "noise_ptr", "v_theta_ptr", "v_old_ptr", "v_ref_ptr", "grad_ptr", "out_ptr")


@dataclass(frozen=True)
class NoiseCall(Call):
    pred: torch.dtype = torch.bfloat16
    latent: torch.dtype = torch.bfloat16
    noise: torch.dtype | None = None  # None: from the seed
    chunks: int = 0  # 0: t and r per video
    weighting: str = "x0_adaptive"
    schedule: str = "rectified_flow"
    masked: bool = False
    ref: bool = True
    weights: bool = False  # sigma, and weights per sample
    shape: tuple[int, ...] = SHAPE
    streaming: bool = True  # False: odd sizes, where wide loads are impossible

    def measure(self, kernel: str, launch: Launch, sizes: dict[str, int]) -> None:
        block = launch.constants.get("BLOCK", 0)
        if "STEPS" in launch.constants:
            launch.hot = "stream"
        if not self.streaming or kernel in ("finalize", "total"):
            return
        for name in _STREAMED:
            written = name == "out_ptr" or (name == "grad_ptr" and "out_ptr" not in sizes)
            # A gradient that is not wanted this early is None and has no size.
            if written:
                launch.stored += block * sizes.get(name, 0)
            else:
                launch.loaded += block * sizes.get(name, 0)

    def run(self, module: Any) -> None:
        batch = self.shape[0]
        chunks = self.shape[2] if self.chunks and not self.streaming else self.chunks
        times = empty(torch.float32, *((batch, chunks) if chunks else (batch,)))
        x0 = empty(self.latent, *self.shape)
        pred = empty(self.pred, *self.shape)
        seed = None if self.noise else empty(torch.int64, batch)
        noise = empty(self.noise, *self.shape) if self.noise else None
        args = [0.1, 20.0] if self.schedule == "vp_linear" else []
        if self.op in ("nft_loss_bwd", "nft_loss_bwd_"):
            getattr(module, self.op)(pred, empty(torch.float32))
            return
        if self.op != "nft_loss":
            inputs = NoiseInputs(x0, times, seed, noise)
            plan = plan_forward_noise(inputs, NoiseOptions(self.schedule, args, "BCFHW"))
            if self.op == "forward_noise":
                module.forward_noise(*inputs, plan)
            else:
                module.forward_noise_bwd(x0, times, plan)
            return
        ref = pred if self.ref else None
        mask = empty(torch.bool, batch, self.shape[2]) if self.masked else None
        weights = empty(torch.float32, batch) if self.weights else None
        sigma = times if self.weights else None
        tensors = NftInputs(
            *(pred, pred, ref, x0, times, times, seed, noise, mask, sigma, weights, weights)
        )
        options = NftOptions(
            nft_beta=0.1,
            prior_weight=1e-2 if self.ref else 0.0,
            weighting=self.weighting,
            prior_space="x0" if self.weighting == "x0" else "velocity",
            group="chunk" if self.chunks else "video",
            prior_by_r=True,
            schedule=self.schedule,
            schedule_args=args,
        )
        module.nft_loss(tensors, plan_nft_loss(tensors, options))


_FP32 = {"pred": torch.float32, "latent": torch.float32}
_MIXED = {"latent": torch.float32, "noise": torch.float32}
_FP16 = {"pred": torch.float16, "latent": torch.float16}
_VP = {"schedule": "vp_linear", "archs": ONE_EACH}
_ODD = {"shape": (2, 3, 5, 7, 3), "streaming": False, "archs": ONE_EACH}
_ALL = ("partials", "finalize", "grad")
_ONE_PASS = ("partials", "finalize", "total")
CALLS = (
    NoiseCall("bf16", "forward_noise", ("fwd",)),
    NoiseCall("fp32", "forward_noise", ("fwd",), **_FP32),
    NoiseCall("chunks", "forward_noise", ("fwd",), chunks=CHUNKS),
    NoiseCall("noise_given", "forward_noise", ("fwd",), noise=torch.float32, archs=ONE_EACH),
    NoiseCall("vp_cosine", "forward_noise", ("fwd",), schedule="vp_cosine", archs=ONE_EACH),
    NoiseCall("vp_linear", "forward_noise", ("fwd",), **_VP),
    NoiseCall("odd", "forward_noise", ("fwd",), **_ODD),
    NoiseCall("bf16", "forward_noise_bwd", ("bwd",)),
    NoiseCall("fp32", "forward_noise_bwd", ("bwd",), **_FP32),
    NoiseCall("bf16", "nft_loss", _ALL),
    NoiseCall("mixed", "nft_loss", ("partials", "grad"), **_MIXED),
    NoiseCall("fp32", "nft_loss", ("partials", "grad"), **_FP32),
    NoiseCall("chunks", "nft_loss", _ALL, chunks=CHUNKS),
    NoiseCall("velocity", "nft_loss", ("partials", "total"), weighting="velocity"),
    NoiseCall("x0", "nft_loss", _ONE_PASS, chunks=CHUNKS, weighting="x0", weights=True),
    NoiseCall("vp_linear", "nft_loss", _ALL, chunks=CHUNKS, **_VP),
    NoiseCall("no_ref", "nft_loss", ("grad",), ref=False, archs=ONE_EACH),
    NoiseCall("fp16", "nft_loss", ("grad",), archs=ONE_EACH, **_FP16),
    NoiseCall("masked", "nft_loss", _ALL, chunks=CHUNKS, masked=True, archs=ONE_EACH),
    NoiseCall("odd", "nft_loss", ("partials", "grad"), **_ODD),
    NoiseCall("bf16", "nft_loss_bwd", ("scale",)),
    NoiseCall("bf16", "nft_loss_bwd_", ("scale",)),
)
