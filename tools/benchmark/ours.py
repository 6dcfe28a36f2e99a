"""This library, through its public functions, on the arrays of a device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

import slidesparse_nb as ss

from .check import COLUMNS, ROWS, check_packed, check_product, check_quantized, sample
from .selection import Group, Kind, Linear
from .trial import Call, Launch, Trial, Verdict


class Device(Protocol):
    """Operands, on whatever makes and runs them; see gpu.Gpu."""

    def normal(self, rows: int, columns: int, dtype: str) -> Any: ...
    def empty(self, rows: int, columns: int, dtype: str) -> Any: ...
    def workspace(self, m: int, packed: ss.PackedWeight, dtype: Any) -> Any: ...
    def host(self, array: Any, rows: Any = None, columns: Any = None) -> Any: ...
    def poison(self, array: Any) -> None: ...
    def unwritten(self, array: Any) -> int: ...
    def capture(self, calls: Sequence[Call]) -> Launch: ...
    def free(self) -> None: ...


class Ours:
    """The contender "ours". Weights are kept from one m to the next, until pattern, type or suite change."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._weights: dict[Linear, list[ss.PackedWeight]] = {}
        self._of: tuple[Any, ...] = ()
        self._random = np.random.default_rng(7)

    def capture(self, calls: Sequence[Call]) -> Launch:
        return self.device.capture(calls)

    def release(self) -> None:
        self._weights.clear()
        self._of = ()
        self.device.free()

    def trial(self, group: Group, linear: Linear, copies: int) -> Trial:
        assert group.pattern is not None
        if group.part == "pack":
            return self._pack(group.kind, group.pattern, linear)
        assert group.m is not None
        packed = self._packed(group, linear, copies)
        if group.part == "quantize":
            return self._quantize(group.kind, group.m, packed)
        return self._product(group, group.m, packed)

    # ---- weights -------------------------------------------------------------------------------------------------

    def _packed(self, group: Group, linear: Linear, copies: int) -> list[ss.PackedWeight]:
        """Distinct weights; the first of them is checked."""
        assert group.pattern is not None
        of = (group.suite.name, group.kind.key, group.pattern)
        if self._of != of:
            self.release()
            self._of = of
        known = self._weights.setdefault(linear, [])
        while len(known) < copies:
            w = self.device.normal(linear.n, linear.k, group.kind.activations)
            packed = ss.pack(w, group.pattern, group.kind.name, prune="magnitude")
            if not known:
                self._packed_verdict(packed, w)()
            known.append(packed)
        return known[:copies]

    def _rows(self, packed: ss.PackedWeight, rows: Any) -> ss.PackedWeight:
        """Some rows of packed weights, on the host."""
        values, meta = self.device.host(packed.values, rows), self.device.host(packed.meta, rows)
        scale = None if packed.scale is None else self.device.host(packed.scale, rows)
        values = values.view(packed.dtype.numpy)
        return ss.PackedWeight(values, meta, scale, packed.pattern, (len(rows), packed.k), packed.scheme)

    def _packed_verdict(self, packed: ss.PackedWeight, w: Any) -> Verdict:
        rows = sample(packed.n, ROWS, self._random)
        return partial(check_packed, self._rows(packed, rows), self.device.host(w, rows))

    def _pack(self, kind: Kind, pattern: str, linear: Linear) -> Trial:
        w = self.device.normal(linear.n, linear.k, kind.activations)

        def pack() -> ss.PackedWeight:
            return ss.pack(w, pattern, kind.name, prune="magnitude")

        return Trial([pack], check=lambda: self._packed_verdict(pack(), w), on_host=True)

    # ---- activations ---------------------------------------------------------------------------------------------

    def _quantize(self, kind: Kind, m: int, packed: list[ss.PackedWeight]) -> Trial:
        xs = [self.device.normal(m, p.k, kind.activations) for p in packed]
        calls = [partial(ss.quantize, x, p) for x, p in zip(xs, packed, strict=True)]

        def check() -> Verdict:
            q, p = ss.quantize(xs[0], packed[0]), packed[0]
            rows = sample(m, ROWS, self._random)
            values = self.device.host(q.values, rows).view(p.dtype.numpy)
            scale = None if q.scale is None else self.device.host(q.scale, rows)
            tokens = self.device.host(xs[0], rows)
            product = self._verdict(ss.matmul(q, p), xs[0], p)

            def verdict() -> None:
                check_quantized(values, scale, tokens, p)
                product()

            return verdict

        return Trial(calls, check=check)

    def _product(self, group: Group, m: int, packed: list[ss.PackedWeight]) -> Trial:
        kind, n, k = group.kind, packed[0].n, packed[0].k
        xs = [self.device.normal(m, k, kind.activations) for _ in packed]
        ys = [self.device.empty(m, n, kind.activations) for _ in packed]
        given: list[Any] = xs
        if group.part == "gemm":
            given = [ss.quantize(x, p) for x, p in zip(xs, packed, strict=True)]
        workspace = self.device.workspace(m, packed[0], ys[0].dtype)
        calls: list[Call] = [
            partial(ss.matmul, x, p, out=y, workspace=workspace) for x, p, y in zip(given, packed, ys, strict=True)
        ]

        def check(i: int) -> Verdict:
            if missing := self.device.unwritten(ys[i]):
                raise ss.VerificationError(f"{missing} results were not written")
            return self._verdict(ys[i], xs[i], packed[i])

        def first() -> Verdict:
            self.device.poison(ys[0])
            calls[0]()
            return check(0)

        return Trial(calls, check=first, poison=lambda: self.device.poison(ys[-1]), check_again=lambda: check(-1))

    def _verdict(self, y: Any, x: Any, packed: ss.PackedWeight) -> Verdict:
        rows, columns = sample(x.shape[0], ROWS, self._random), sample(packed.n, COLUMNS, self._random)
        fetched = self.device.host(y, rows, columns), self.device.host(x, rows), self._rows(packed, columns)
        return partial(check_product, *fetched)
