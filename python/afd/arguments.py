"""Reports arguments of the wrong Python type as the ops' documented ValueError."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from functools import wraps
from numbers import Real
from typing import (
    Any,
    Literal,
    ParamSpec,
    SupportsIndex,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import torch

from afd_kernels.contracts import require

P = ParamSpec("P")
T = TypeVar("T")

_NAMES = {float: "a number", int: "an integer", str: "a string", bool: "a bool", type(None): "None"}


def typed(function: Callable[P, T]) -> Callable[P, T]:
    """Wraps a function with annotated parameters.

    A call that fails with another error than ValueError is checked against the annotations, and
    raises ValueError for the first argument that does not fit. A call that succeeds costs nothing
    more.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except (TypeError, RuntimeError, AttributeError):
            _check(function, args, kwargs)
            raise

    return call


def _check(function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Raises ValueError if an argument does not fit its annotation.

    A missing or unknown argument is left to Python's own TypeError.
    """
    try:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
    except TypeError:
        return
    hints = get_type_hints(function)
    for name, value in given.items():
        require(_fits(value, hints[name]), name, value, _described(hints[name]))


def _fits(value: object, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, tuple(map(type, get_args(hint))))
    if hint is float:
        return isinstance(value, Real)
    if hint is int:
        single = not isinstance(value, torch.Tensor) or value.numel() == 1
        return isinstance(value, SupportsIndex) and single
    return isinstance(value, get_origin(hint) or hint)


def _described(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_described, get_args(hint)))
    if get_origin(hint) is Literal:
        return ", ".join(map(repr, get_args(hint)))
    name = (get_origin(hint) or hint).__name__
    return _NAMES.get(hint, f"{'an' if name[0] in 'AEIOU' else 'a'} {name}")
