"""This library as a provider, through its public functions, on the arrays of a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

import slidesparse_nb as ss

from .cases import Call, Calls, Case, Linear
from .check import COLUMNS, ROWS, check_equal, check_packed, check_product, quantized, sample


class Ours:
    """Weights are kept from one m to the next, until pattern, type or suite change.

    Args:
        device: `measure.Gpu`.
    """

    def __init__(self, device: Any) -> None:
        self.device = device
        self._weights: dict[Linear, list[ss.PackedWeight]] = {}
        self._of: tuple[Any, ...] = ()
        self._random = np.random.default_rng(7)

    def capture(self, calls: Sequence[Call]) -> Callable[[], None]:
        launch: Callable[[], None] = self.device.capture(calls)
        return launch

    def release(self) -> None:
        self._weights.clear()
        self._of = ()
        self.device.free()

    def prepare(self, case: Case, linear: Linear, copies: int) -> Calls:
        assert case.pattern is not None
        kind = case.kind
        if case.part == "pack":
            w = self.device.normal(linear.n, linear.k, kind.activations)
            pack = partial(ss.pack, w, case.pattern, kind.name, prune="magnitude")
            return Calls([pack], check=lambda i: self._check_packed(pack(), w), on_host=True)
        assert case.m is not None
        packed = self._packed(case, linear, copies)
        xs = [self.device.normal(case.m, linear.k, kind.activations) for _ in packed]
        if case.part == "quantize":
            calls = [partial(ss.quantize, x, p) for x, p in zip(xs, packed, strict=True)]
            return Calls(calls, check=lambda i: self._check_quantized(xs[i], packed[i]))
        given = [ss.quantize(x, p) for x, p in zip(xs, packed, strict=True)] if case.part == "gemm" else xs
        ys = [self.device.empty(case.m, linear.n, kind.activations) for _ in packed]
        workspace = self.device.workspace(case.m, packed[0], ys[0].dtype)
        calls = [partial(ss.matmul, x, p, out=y, workspace=workspace) for x, p, y in zip(given, packed, ys, strict=True)]
        return Calls(calls, check=lambda i: self._check_product(ys[i], xs[i], packed[i]), outputs=ys)

    def _packed(self, case: Case, linear: Linear, copies: int) -> list[ss.PackedWeight]:
        """Distinct weights; the first of them is checked."""
        assert case.pattern is not None
        of = (case.suite.name, case.kind.key, case.pattern)
        if self._of != of:
            self.release()
            self._of = of
        known = self._weights.setdefault(linear, [])
        while len(known) < copies:
            w = self.device.normal(linear.n, linear.k, case.kind.activations)
            packed = ss.pack(w, case.pattern, case.kind.name, prune="magnitude")
            if not known:
                self._check_packed(packed, w)
            known.append(packed)
        return known[:copies]

    # ---- checks --------------------------------------------------------------------------------------------------

    def _on_host(self, packed: ss.PackedWeight, rows: Any) -> ss.PackedWeight:
        """Some rows of packed weights, as NumPy arrays."""
        host = self.device.host
        values, meta = host(packed.values, rows).view(packed.dtype.numpy), host(packed.meta, rows)
        scale = None if packed.scale is None else host(packed.scale, rows)
        return ss.PackedWeight(values, meta, scale, packed.pattern, (len(rows), packed.k), packed.scheme)

    def _check_packed(self, packed: ss.PackedWeight, w: Any) -> None:
        rows = sample(packed.n, ROWS, self._random)
        check_packed(self._on_host(packed, rows), self.device.host(w, rows))

    def _check_quantized(self, x: Any, packed: ss.PackedWeight) -> None:
        q, rows, host = ss.quantize(x, packed), sample(x.shape[0], ROWS, self._random), self.device.host
        values = host(q.values, rows).view(packed.dtype.numpy)
        scale = None if q.scale is None else host(q.scale, rows)
        check_equal("quantized tokens", (values, scale), quantized(host(x, rows), packed))
        self._check_product(ss.matmul(q, packed), x, packed)

    def _check_product(self, y: Any, x: Any, packed: ss.PackedWeight) -> None:
        if missing := self.device.unwritten(y):
            raise ss.VerificationError(f"{missing} results were not written")
        rows, columns = sample(x.shape[0], ROWS, self._random), sample(packed.n, COLUMNS, self._random)
        check_product(self.device.host(y, rows, columns), self.device.host(x, rows), self._on_host(packed, columns))
