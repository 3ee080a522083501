"""CUDA C++ to C++: what a host compiler cannot read is spelt as calls of the shim.

    kernel<float><<<grid, block, bytes, stream>>>(x);   a call of cuda_on_cpu::launch
    __shared__ float x[8];                              a reference to the block's variable
    extern __shared__ float x[];                        a pointer to the launch's shared memory
    __launch_bounds__(256) kernel(...) {                a check at the kernel's start

Lines stay where they are. What is written in another way than these raises.
"""

from __future__ import annotations

import re

_SHARED = re.compile(
    r"(?P<extern>extern\s+)?__shared__\s+(?P<align>(?:__align__|alignas)\s*\([^()]*\)\s*)?"
    r"(?P<type>[\w:]+(?:\s*<[^;<>]*>)?(?:\s+\w+(?=\s+\w))*)\s+"
    r"(?P<name>\w+)\s*(?P<sizes>(?:\[[^\]]*\]\s*)*);"
)
_BOUNDS = re.compile(r"__launch_bounds__\s*\(([^(),]*)(?:,[^()]*)?\)\s*\w+\s*(?=\()")
_KERNEL = re.compile(r"[\w:]+\s*$")


class RewriteError(ValueError):
    """A line of CUDA that rewrite.py does not know."""


def rewritten(source: str) -> str:
    """The source for a host compiler, with as many lines.

    Raises:
        RewriteError: for a launch, or a variable in shared memory, of an unknown form.
    """
    code = _without_comments(source)
    code = _launches(code)
    code = _bounds(code)
    code = _SHARED.sub(_shared, code)
    if left := re.search(r".*(?:__shared__|<<<|__launch_bounds__).*", code):
        raise RewriteError(f"cannot rewrite {left[0].strip()!r}")
    return code


def _without_comments(code: str) -> str:
    """Comments as blanks, so that no pattern is found inside one; strings stay."""
    pattern = r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/'

    def blank(found: re.Match[str]) -> str:
        text = found[0]
        return text if text[0] == '"' else re.sub(r"[^\n]", " ", text)

    return re.sub(pattern, blank, code, flags=re.S)


def _shared(found: re.Match[str]) -> str:
    kind, name, sizes = found["type"], found["name"], found["sizes"].strip()
    if found["extern"]:
        if sizes.replace(" ", "") != "[]":
            raise RewriteError(f"cannot rewrite {found[0]!r}")
        made = f"{kind}* const {name} = cuda_on_cpu::dynamic_shared<{kind}>();"
    else:
        made = f"auto& {name} = cuda_on_cpu::shared<{kind}{sizes}>([] {{}});"
    return made + "\n" * found[0].count("\n")


def _bounds(code: str) -> str:
    parts, at = [], 0
    for found in _BOUNDS.finditer(code):
        start = code.index("(", found.end() - 1)
        end = _closing(code, start)
        brace = re.compile(r"\s*\{").match(code, end)
        parts.append(code[at : found.start()])
        parts.append(re.sub(r"__launch_bounds__\s*\([^()]*\)", "", found[0]))
        at = brace.end() if brace else end
        check = f" cuda_on_cpu::check_bounds({found[1]});" if brace else ""
        parts.append(code[found.end() : at] + check)
    return "".join([*parts, code[at:]])


def _launches(code: str) -> str:
    parts, at = [], 0
    while (begin := code.find("<<<", at)) >= 0:
        name = _kernel_before(code, begin)
        end = code.find(">>>", begin)
        if end < 0:
            raise RewriteError(f"cannot rewrite {code[name : begin + 80]!r}")
        call = re.compile(r"\s*\(").match(code, end + 3)
        if call is None:
            raise RewriteError(f"cannot rewrite {code[name : end + 20]!r}")
        close = _closing(code, call.end() - 1)
        kernel = code[name:begin].strip()
        label = re.sub(r"\s+", " ", kernel)
        arguments = code[call.end() : close - 1]
        separator = ", " if arguments.strip() else ""
        parts.append(code[at:name])
        parts.append(
            f'cuda_on_cpu::launch("{label}", cuda_on_cpu::Config({code[begin + 3 : end]}), '
            f"{kernel}{separator}{arguments})"
        )
        at = close
    return "".join([*parts, code[at:]])


def _kernel_before(code: str, end: int) -> int:
    """Where the kernel's name begins that ends at `end`, template arguments and all."""
    stop = len(code[:end].rstrip())
    if code[stop - 1] == ">":
        angles = rounds = 0
        for i in range(stop - 1, -1, -1):
            rounds += (code[i] == ")") - (code[i] == "(")
            # Between round brackets < and > compare.
            angles += ((code[i] == ">") - (code[i] == "<")) * (rounds == 0)
            if angles == rounds == 0:
                stop = i
                break
    found = _KERNEL.search(code, 0, stop)
    if found is None:
        raise RewriteError(f"cannot rewrite {code[max(0, end - 80) : end + 20]!r}")
    return found.start()


def _closing(code: str, start: int) -> int:
    """The position after the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(code)):
        depth += (code[i] in "([{") - (code[i] in ")]}")
        if depth == 0:
            return i + 1
    raise RewriteError(f"cannot rewrite {code[start : start + 80]!r}")
