"""What a compiled kernel is made of, read from its machine code; no GPU needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """Numbers of one kernel on one architecture.

    The hot region is the whole "kernel", or the innermost loop that loads a "stream" in 16-byte
    pieces, or the innermost loop that multiplies matrices ("products"). Instructions (the matrix
    ones left out) and wide loads are of one thread in one pass over it; a kernel of products
    stores its result after the loop, so that its stores are the whole kernel's.
    """

    registers: int
    shared: int  # bytes per program
    stack: int  # bytes per thread
    spills: int  # loads and stores of spilled registers
    atomics: int
    instructions: int
    wide_loaded: int
    wide_stored: int
    products: tuple[str, ...] = ()  # kinds of matrix instructions in the kernel


_SASS_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.M)
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
# Hopper's asynchronous products, Blackwell's, and those of one warp; AMD's.
_SASS_PRODUCT = r"HGMMA|UTC\w*MMA|[HIDQ]MMA"
_AMD_PRODUCT = r"v_mfma"


def of_cubin(cubin: bytes, cuobjdump: str, region: str) -> dict[str, Measured]:
    """By function name, for an NVIDIA cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def dump(flag: str) -> str:
            command = [cuobjdump, flag, str(path)]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage, sass = dump("-res-usage"), dump("-sass")
    listings = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s+Function : |\Z)", sass, re.S))
    found = {}
    for name, numbers in re.findall(r"Function (\S+):\n\s+(.*)", usage):
        value = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", numbers)}
        sizes = (value["REG"], value["SHARED"], value["STACK"])
        found[name] = _of_sass(listings[name], *sizes, region)
    return found


def _of_sass(listing: str, registers: int, shared: int, stack: int, region: str) -> Measured:
    code = [(int(at, 16), _PREDICATE.sub("", text)) for at, text in _SASS_LINE.findall(listing)]
    names = [text.split()[0].rstrip(",") for _, text in code]

    def count(pattern: str, within: list[str]) -> int:
        return sum(bool(re.match(pattern, name)) for name in within)

    wanted = _SASS_PRODUCT if region == "products" else r"LDG\S*\.128"
    hot = names
    for index, (at, text) in enumerate(code if region != "kernel" else ()):
        jump = re.match(r"BRA.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < at:
            start = next(i for i, (a, _) in enumerate(code) if a >= int(jump[1], 16))
            body = names[start : index + 1]
            if count(wanted, body) and len(body) < len(hot):
                hot = body
    return Measured(
        registers=registers,
        shared=shared,
        stack=stack,
        spills=count(r"(LDL|STL)\b", names),
        # Not bit masks, which any order leaves the same: Blackwell keeps its tensor memory so.
        atomics=count(r"(RED|ATOM\w*)\b(?!\.(OR|AND)\b)", names),
        instructions=len(hot) - count(rf"NOP|{_SASS_PRODUCT}", hot),
        wide_loaded=16 * count(r"LDG\S*\.128", hot),
        wide_stored=16 * count(r"STG\S*\.128", names if region == "products" else hot),
        products=_kinds(_SASS_PRODUCT, names),
    )


def _kinds(pattern: str, names: list[str]) -> tuple[str, ...]:
    return tuple(sorted({found[0] for name in names if (found := re.match(pattern, name))}))


def of_amdgcn(text: str, region: str) -> Measured:
    """For AMD assembly as Triton keeps it."""

    def meta(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    code = re.findall(r"^\s+([a-z]\w+)(?:\s|$)", text.split(".section")[0], re.M)
    labels = {m[1]: m.start() for m in re.finditer(r"^(\.LBB\w+):", text, re.M)}
    hot, hot_text = code, text.split(".section")[0]
    wanted = _AMD_PRODUCT if region == "products" else "_load_dwordx4"
    jumps = re.finditer(r"s_c?branch\w*\s+(\.LBB\w+)", text) if region != "kernel" else ()
    # A loop ends with the last jump back to its start; earlier ones skip a part of it.
    ends = {jump[1]: jump.end() for jump in jumps}
    for label, end in ends.items():
        body = text[labels.get(label, end) : end]
        if wanted in body and len(body) < len(hot_text):
            hot_text, hot = body, re.findall(r"^\s+([a-z]\w+)(?:\s|$)", body, re.M)

    def count(pattern: str, within: list[str]) -> int:
        return sum(bool(re.match(pattern, name)) for name in within)

    return Measured(
        registers=meta("vgpr_count"),
        shared=meta("group_segment_fixed_size"),
        stack=meta("private_segment_fixed_size"),
        spills=meta("vgpr_spill_count") + meta("sgpr_spill_count"),
        atomics=count(r"(global|flat|buffer|ds)_\w*(atomic|_add_)", code),
        instructions=len(hot) - count(_AMD_PRODUCT, hot),
        wide_loaded=16 * count(r"(global|buffer)_load_dwordx4", hot),
        wide_stored=16
        * count(r"(global|buffer)_store_dwordx4", code if region == "products" else hot),
        products=_kinds(_AMD_PRODUCT, code),
    )
