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

    The hot region is the innermost loop that streams, of a kernel that loops over tiles, else the
    whole kernel; instructions and wide bytes are of one thread in one pass over it.
    """

    registers: int
    shared: int  # bytes per program
    stack: int  # bytes per thread
    spills: int  # loads and stores of spilled registers
    atomics: int
    instructions: int
    wide_loaded: int
    wide_stored: int


_SASS_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.M)
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")


def of_cubin(cubin: bytes, cuobjdump: str, loops: bool) -> dict[str, Measured]:
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
        found[name] = _of_sass(listings[name], value["REG"], value["SHARED"], value["STACK"], loops)
    return found


def _of_sass(listing: str, registers: int, shared: int, stack: int, loops: bool) -> Measured:
    code = [(int(at, 16), _PREDICATE.sub("", text)) for at, text in _SASS_LINE.findall(listing)]
    names = [text.split()[0].rstrip(",") for _, text in code]

    def count(pattern: str, within: list[str]) -> int:
        return sum(bool(re.match(pattern, name)) for name in within)

    hot = names
    for index, (at, text) in enumerate(code if loops else ()):
        jump = re.match(r"BRA.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < at:
            start = next(i for i, (a, _) in enumerate(code) if a >= int(jump[1], 16))
            body = names[start : index + 1]
            if count(r"LDG\S*\.128", body) and len(body) < len(hot):
                hot = body
    return Measured(
        registers=registers,
        shared=shared,
        stack=stack,
        spills=count(r"(LDL|STL)\b", names),
        atomics=count(r"(RED|ATOM\w*)\b", names),
        instructions=len(hot) - count("NOP", hot),
        wide_loaded=16 * count(r"LDG\S*\.128", hot),
        wide_stored=16 * count(r"STG\S*\.128", hot),
    )


def of_amdgcn(text: str, loops: bool) -> Measured:
    """For AMD assembly as Triton keeps it."""

    def meta(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    code = re.findall(r"^\s+([a-z]\w+)(?:\s|$)", text.split(".section")[0], re.M)
    labels = {m[1]: m.start() for m in re.finditer(r"^(\.LBB\w+):", text, re.M)}
    hot, hot_text = code, text.split(".section")[0]
    jumps = re.finditer(r"s_c?branch\w*\s+(\.LBB\w+)", text) if loops else ()
    for jump in jumps:
        start = labels.get(jump[1], len(text))
        body = text[start : jump.end()]
        if start < jump.start() and "_load_dwordx4" in body and len(body) < len(hot_text):
            hot_text, hot = body, re.findall(r"^\s+([a-z]\w+)(?:\s|$)", body, re.M)

    def count(pattern: str, within: list[str]) -> int:
        return sum(bool(re.match(pattern, name)) for name in within)

    return Measured(
        registers=meta("vgpr_count"),
        shared=meta("group_segment_fixed_size"),
        stack=meta("private_segment_fixed_size"),
        spills=meta("vgpr_spill_count") + meta("sgpr_spill_count"),
        atomics=count(r"(global|flat|buffer|ds)_\w*(atomic|_add_)", code),
        instructions=len(hot),
        wide_loaded=16 * count(r"(global|buffer)_load_dwordx4", hot),
        wide_stored=16 * count(r"(global|buffer)_store_dwordx4", hot),
    )
