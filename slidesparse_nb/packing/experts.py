"""Weights with leading dimensions, [e, n, k] and more: pack, unpack and verify one matrix after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import OperandError, SlideSparseError, printable

T = TypeVar("T")


def each(count: int, work: Callable[[int], T]) -> list[T]:
    """`work` of every expert 0 to count - 1; the error that it raises gets the expert's number."""
    done = []
    for i in range(count):
        try:
            done.append(work(i))
        except SlideSparseError as error:
            error.args = (printable(f"expert {i}: {error}"),)
            raise
    return done


def of_expert(name: str, value: Any, i: int, count: int) -> Any:
    """The part of `value` (scales, scores, statistics of a stack) that belongs to expert i; one value for all is given to each.

    Raises:
        OperandError: `value` is an array, and not of `count` parts.
    """
    shape = tuple(getattr(value, "shape", ()))
    if not shape or shape == (1,):
        return value
    if shape[0] != count:
        raise OperandError(f"{name}: shape {shape} must begin with {count}, the number of experts")
    return value[i]
