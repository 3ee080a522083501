"""Instructions that a token costs in Triton and in the CUDA kernels of the compiled core.

    python -m tests.offline.predicted              for sm_90, a token of 1,536 channels in bfloat16
    python -m tests.offline.predicted --arch sm_80

Both are static counts of whole kernels, times the warps that share a token: what stands outside a
backward's loop counts as if each token had its own. The CUDA kernels leave to run time what
Triton's specialise: which tensors are there, and the modulation's type; for the comparison they
are compiled with the answers of Triton's call in their place. Until a GPU has measured both, the
order in dispatch.OPS rests on this table.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.offline import budget, cuda_sources
from tests.offline.fused_calls import CALLS, CHANNELS
from tests.offline.launches import record

_KIND = "sizeof(T) == sizeof(float) || type == DType::kFloat32"
_GATED = {
    "rows.cuh": {_KIND: "true"},
    "adaln.cu": {
        "if (p.branch.data != nullptr)": "if (true)",
        "if (p.gate.data != nullptr)": "if (true)",
        "p.gate.data == nullptr ? 1.0f :": "",
        "if (p.grad_x_out.data != nullptr)": "if (true)",
        "const bool with_gate = p.dbranch != nullptr;": "constexpr bool with_gate = true;",
    },
}


def _appending(is_so: bool) -> Mapping[str, Mapping[str, str]]:
    answers = {"p.k_out != nullptr": str(not is_so), "p.k_out == nullptr": str(is_so)}
    return {
        "rows.cuh": {_KIND: "sizeof(T) == sizeof(float)"},
        "qk_norm_rope.cu": {question: answer.lower() for question, answer in answers.items()},
    }


# By the op as Triton's calls name it: the source, the kernel and what is answered in its texts.
NATIVE = {
    "adaln": ("adaln", "_adaln_fwd_kernel", _GATED),
    "adaln_bwd": ("adaln", "_adaln_bwd_kernel", _GATED),
    "qk_norm_rope": ("qk_norm_rope", "_qk_norm_rope_fwd_kernel", _appending(False)),
    "qk_norm_rope_append_": ("qk_norm_rope", "_qk_norm_rope_fwd_kernel", _appending(True)),
    "qk_norm_rope_bwd": ("qk_norm_rope", "_qk_norm_rope_bwd_kernel", _appending(False)),
}


def native(op: str, arch: str) -> float:
    """Instructions of all warps for one token in the compiled core's kernel."""
    source, kernel, answers = NATIVE[op]
    with tempfile.TemporaryDirectory() as folder:
        for path in cuda_sources.SOURCES[0].parent.iterdir():
            text = path.read_text(encoding="utf-8")
            for question, answer in answers.get(path.name, {}).items():
                assert question in text, f"{path.name}: no {question!r}"
                text = text.replace(question, answer)
            (Path(folder) / path.name).write_text(text, encoding="utf-8")
        results = cuda_sources.compile_source(Path(folder) / f"{source}.cu", arch)
    name = f"{source}.{kernel}<NS_4bf16ELb1EE>"
    (found,) = (result for result in results if result.kernel == name)
    return found.per_element * CHANNELS / 32


def triton(op: str, arch: str) -> float:
    """The same in Triton's kernel; needs the real compiler."""
    (call,) = (call for call in CALLS if (call.op, call.name) == (op, "bf16"))
    launch = record(call, arch)["bwd" if op.endswith("_bwd") else "fwd"]
    result = budget.compile_launch(launch, op, arch)
    return result.per_element * launch.constants["BLOCK"] / 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", choices=cuda_sources.ARCHS, default="sm_90")
    arch = parser.parse_args().arch
    with tempfile.TemporaryDirectory() as folder:
        budget.start(folder)
        import triton as compiler

        print(f"{'':22} triton {compiler.__version__} {cuda_sources.nvcc_version()} ({arch})")
        for op in NATIVE:
            print(f"{op:22} {triton(op, arch):12.0f} {native(op, arch):9.0f}", flush=True)


if __name__ == "__main__":
    main()
