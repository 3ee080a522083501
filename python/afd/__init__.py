"""On-Policy Adversarial Flow Distillation: ops, causal video student, trainer.

`afd.ops` and `afd.rollout` are imported when they are first asked for: the former needs the core
alone, the latter the extra `train`.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from afd import ops, rollout

__all__ = ["__version__", "ops", "rollout"]

__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    if name in ("ops", "rollout"):
        return import_module(f"afd.{name}")
    raise AttributeError(f"module 'afd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
