"""Offsets beyond 2^31 elements: no memory is needed to see that they are 64 bits wide."""

from __future__ import annotations

import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch

from tests.offline import noise_calls
from tests.offline.calls import CALLS
from tests.offline.launches import Call

# One sample of 2^31 + 2^13 elements per video; 2^32 elements in rows per frame.
HUGE = {
    "video": (2, 2**18 + 1, 2**13),
    "frame": (2, 2, 4, 2**14, 2**15),
}

# Ops whose kernels take strides: the multiplication is wide whatever comes.
_STRIDED = [
    replace(call, kernels=tuple(k for k in call.kernels if k != "reduce"))
    for call in CALLS
    if (call.op, call.name)
    in {
        ("block_attention", "noisy"),
        ("block_attention_bwd", "forcing"),
        ("qk_norm_rope_append_", "bf16"),
        ("adaln", "bf16"),
        ("adaln_bwd", "bf16"),
    }
]


def _huge(op: str, kind: str) -> Call:
    base = next(call for call in noise_calls.CALLS if call.op == op)
    names = ("fwd", "bwd", "partials", "grad", "scale")
    return replace(base, shape=HUGE[kind], chunks=0 if kind == "video" else 4, kernels=names)


def _intermediate(call: Call) -> dict[str, str]:
    """Triton's IR before any GPU is chosen, by kernel; runs in a worker."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from tests.offline.launches import record

    found = {}
    for name, launch in record(call, "sm_90").items():
        names = launch.kernel.arg_names
        source = ASTSource(
            launch.kernel,
            {n: launch.types.get(n, "constexpr") for n in names},
            constexprs={(names.index(n),): value for n, value in launch.constants.items()},
        )
        compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options)
        found[name] = compiled.asm["ttir"]
    return found


def _narrow_offsets(ir: str) -> list[str]:
    """Where an offset into streamed data could overflow: a 32-bit one, or one widened too late."""
    values = dict(re.findall(r"^\s*(%[\w#]+) = (.*)$", ir, re.M))
    found = []
    for base, offset, kind in re.findall(r"tt\.addptr (%\w+), (%\w+) : (\S+ ?\S*)", ir):
        streamed = re.search(r"tt\.ptr<(bf16|f16)>", kind)
        is_lane = "tt.make_range" in values.get(offset, "") or "splat" in values.get(offset, "")
        if streamed and re.search(r", (i32|tensor<\d+xi32>)", kind) and not is_lane:
            found.append(f"{base} + {offset}: {kind}")
    for wide, narrow in re.findall(r"(%\w+) = arith\.extsi (%\w+) : i32 to i64", ir):
        if "arith.muli" in values.get(narrow, ""):
            found.append(f"{wide} widens {narrow} after multiplying")
    return found


def _assert_wide(kernels: dict[str, str]) -> None:
    assert kernels
    for name, ir in kernels.items():
        assert re.search(r"tt\.addptr .*!tt\.ptr<bf16>, i64", ir), f"{name} has no 64-bit offset"
        assert _narrow_offsets(ir) == [], name


@pytest.mark.parametrize("kind", sorted(HUGE))
@pytest.mark.parametrize("op", ["forward_noise", "forward_noise_bwd", "nft_loss", "nft_loss_bwd"])
def test_offsets_into_huge_tensors_are_64_bits_wide(
    workers: ProcessPoolExecutor, op: str, kind: str
) -> None:
    _assert_wide(workers.submit(_intermediate, _huge(op, kind)).result())


@pytest.mark.parametrize("call", _STRIDED, ids=lambda call: f"{call.op}.{call.name}")
def test_strides_of_any_size_are_multiplied_in_64_bits(
    workers: ProcessPoolExecutor, call: Call
) -> None:
    _assert_wide(workers.submit(_intermediate, call).result())


@pytest.mark.parametrize(
    "ir",
    [
        "  %1 = tt.addptr %x_ptr, %0 : !tt.ptr<bf16>, i32",
        "  %0 = arith.muli %a, %b : i32\n  %1 = arith.extsi %0 : i32 to i64",
    ],
)
def test_a_32_bit_offset_is_found(ir: str) -> None:
    assert len(_narrow_offsets(ir)) == 1


@pytest.mark.parametrize(
    ("block", "tiles", "inner", "row", "start"),
    [
        (0, 3, 6144, 0, 0),
        (5, 3, 6144, 1, 4096),
        (2**20 + 1, 2**20 + 2, 2**31 + 4096, 0, 2**31 + 2048),
        (2**30, 2**21, 2**32, 2**9, 0),
    ],
)
def test_a_tile_beyond_31_bits_starts_where_it_should(
    block: int, tiles: int, inner: int, row: int, start: int
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed here")
    from tests.offline import noise_kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not noise_kernels.INTERPRETED:
        pytest.skip("Triton was imported without TRITON_INTERPRET=1")
    assert noise_kernels.place(block, inner, tiles, 2048, False, device) == [
        row,
        start,
        inner - start,
    ]
