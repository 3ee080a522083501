"""CUDA C++ to C++: every form of a launch and of shared memory, and what is not known."""

from __future__ import annotations

import pytest

from tests.cuda_on_cpu.rewrite import RewriteError, rewritten


@pytest.mark.parametrize(
    ("cuda", "cpp"),
    [
        (
            "f<<<1, 2>>>();",
            'cuda_on_cpu::launch("f", cuda_on_cpu::Config(1, 2), f);',
        ),
        (
            "a::f<T, (n > 2)>\n<<<dim3(g(1), 2), n, 4 * k(), s>>>(\n  x, g(y));",
            'cuda_on_cpu::launch("a::f<T, (n > 2)>", cuda_on_cpu::Config(dim3(g(1), 2), n, 4 * k(),'
            " s), a::f<T, (n > 2)>, \n  x, g(y));",
        ),
        ("__shared__ float x[2][N / 2];", "auto& x = cuda_on_cpu::shared<float[2][N / 2]>([] {});"),
        ("__shared__ T x;", "auto& x = cuda_on_cpu::shared<T>([] {});"),
        (
            "__shared__ unsigned int x[3];",
            "auto& x = cuda_on_cpu::shared<unsigned int[3]>([] {});",
        ),
        (
            "extern __shared__ __align__(16) char x[];",
            "char* const x = cuda_on_cpu::dynamic_shared<char>();",
        ),
        (
            "__global__ void __launch_bounds__(256, 2) f(int (*g)(int)) {",
            "__global__ void  f(int (*g)(int)) { cuda_on_cpu::check_bounds(256);",
        ),
        ("// f<<<1, 2>>>(x); and __shared__\ny", " " * 34 + "\ny"),
        ('puts("// not a comment");', 'puts("// not a comment");'),
    ],
)
def test_forms(cuda: str, cpp: str) -> None:
    found = rewritten(cuda)
    assert " ".join(found.split()) == " ".join(cpp.split())


@pytest.mark.parametrize("cuda", ["__shared__ float x, y;", "f<<<1, 2>>> x;", "f<<<1, 2 (x);"])
def test_other_forms_are_refused(cuda: str) -> None:
    with pytest.raises(RewriteError, match="cannot rewrite"):
        rewritten(cuda)
