"""The test of a kernel before its first product on a GPU on which we never ran it (`arch.RAN`): exact products against NumPy.

    kernel --products of integers: every nibble in every fragment position, scales, tails--> y == NumPy, element by element
           --outcome--> <cache>/self-test/<GPU>-<compute capability>-<driver>/<kernel>-<hash of its source>.json

A kernel that fails is never chosen again on that GPU with that driver: the next candidate serves, or the portable kernel where
the first candidates of one made for the architecture fail. `slidesparse doctor` prints what failed.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from .. import arch, env
from ..arch import Candidate
from ..arch.operand import Operand, scaled_rows, to_tiles
from ..core import reference
from ..core.dtypes import CUDA_CODES, FLOAT4, FLOATS, INT8, DType
from ..core.packed import PackedWeight
from ..core.pattern import Pattern
from ..core.problem import Device, GemmProblem
from ..core.scheme import Block, Scheme
from ..core.untrusted_json import parse_json
from ..errors import FormatError, SlideSparseError, UnsupportedError
from . import driver, tuned_store
from .jit import cache
from .launch import LaunchError
from .plan import Plan, compiled, counters, device_facts

ALWAYS = 3
SHAPES = (
    (300, 280, 1046),
    (13, 280, 1046),
    (803, 280, 1046),
    *((m, 280, k) for m, k in ((7, 1430), (29, 1430), (61, 1046))),
    *((m, 970, 1046) for m in (7, 29, 61, 140)),
)
"""m, n and k (in columns, or pairs) of the products: no multiple of any tile; of many tokens and of few; k long enough to be
split, also in six. Those after the first `ALWAYS` are for kernels that these do not launch."""

FEW_SMS = {(m, n, k): 2 if m == 803 else 4 for m, n, k in SHAPES if m == 803 or n == 970}
"""Products that are planned for so few SMs that a block computes several tiles, and two blocks may share some."""

TRIED = 3
"""Kernels made for an architecture that are tested before it is left to the portable kernel."""

CAPTURE_ERRORS = range(900, 909)
"""Errors of CUDA about what is not allowed while a stream is captured: none of the kernel's."""

Array = Any
Kernel = tuple[str, tuple[tuple[str, "int | str"], ...]]
"""Source and defines."""


@dataclass(frozen=True)
class Outcome:
    """Whether a kernel computed what NumPy does, and in words how much it computed, or what was wrong and where."""

    passed: bool
    text: str


# ---- what is multiplied ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Operands, and y [m, n] of the problem's type, which has one right value: all sums are exact in float32.

    Attributes:
        packed: weights [n, k] with every nibble in every fragment position.
        x: [m, k] of the type of the weights; [m, ks] where the scheme lifts first.
        block_scale: of x, [m, ceil(ks / columns)], None for schemes without blocks.
        scale_x: [m] float32, None for 16-bit types.
        bias: [n] float32.
    """

    packed: PackedWeight
    x: Array
    block_scale: Array | None
    scale_x: Array | None
    bias: Array
    y: Array


def _integers(rng: np.random.Generator, shape: tuple[int, ...], largest: int, dtype: DType) -> Array:
    """Integers of both signs up to `largest`, none of them 0."""
    return (rng.integers(1, largest + 1, shape) * rng.choice((-1, 1), shape)).astype(dtype.numpy)


def _fours(rng: np.random.Generator, shape: tuple[int, int], magnitudes: tuple[float, ...], kept: Array) -> Array:
    """Float4 values of these magnitudes and of both signs; each pair of columns is multiplied by one of the pairs in `kept`."""
    pairs = np.asarray(kept)[rng.integers(0, len(kept), (shape[0], -(-shape[1] // 2)))].reshape(shape[0], -1)
    return (rng.choice(magnitudes, shape) * rng.choice((-1, 1), shape) * pairs[:, : shape[1]]).astype(FLOAT4.numpy)


def _block_scales(rng: np.random.Generator, rows: int, ks: int, block: Block) -> Array:
    """Scales of blocks [rows, ceil(ks / columns)], which have a power of two of the row in common, so that sums are exact."""
    sizes = (1, 1, 2) if block.up else (1, 1, 2, 3)
    scales = rng.choice(sizes, (rows, -(-ks // block.columns))) * np.exp2(rng.integers(-5, 1, (rows, 1)))
    return scales.astype(block.scale.numpy)


def _scores(rng: np.random.Generator, shape: tuple[int, int], group: int) -> Array:
    """Scores [n, k] by which to prune: the zeros of two in three groups are at most two columns apart, since others make the
    nibbles 0x8, 0xC and 0xD rare."""
    scores = rng.random((shape[0], -(-shape[1] // group), group))
    first, near = rng.integers(0, group - 1, scores.shape[:2]), rng.random(scores.shape[:2]) < 2 / 3
    for column in (first, np.minimum(first + rng.integers(1, 3, first.shape), group - 1)):
        np.put_along_axis(scores, column[..., None], np.where(near, 0, rng.random(near.shape))[..., None], axis=2)
    return scores.reshape(shape[0], -1)[:, : shape[1]]


@lru_cache(maxsize=len(SHAPES))
def case(problem: GemmProblem) -> Case:
    """Sums stay below 2^24, and of float types below 2^13 of their smallest step, which the shortest accumulator holds."""
    m, n, k, pattern, scheme, dtype = problem.m, problem.n, problem.k, problem.pattern, problem.scheme, problem.dtype
    rng, ks, block = np.random.default_rng(0), pattern.expanded_k(k), scheme.weights.block
    if block:
        w = _fours(rng, (n, k), (0.5, 1, 1.5, 2, 3, 4, 6), ((1, 0), (0, 1), (1, 1)))
        zeros = k // (170 * pattern.unit)  # the longer k, the sparser x, for the sums
        x = _fours(rng, (m, ks), (1, 1, 2, 3), ((1, 0), (0, 1), *zeros * ((0, 0),)))
    else:
        most_w, most_x = (127, 127) if dtype is INT8 else (4, 3)
        w, x = _integers(rng, (n, k), most_w, dtype), _integers(rng, (m, k), most_x, dtype)
    scores = _scores(rng, (n, -(-k // pattern.unit)), pattern.group)
    w = reference.prune(w, pattern, scores.repeat(pattern.unit, axis=1)[:, :k])
    values, meta = reference.compress(reference.slide(w, pattern), pattern.unit)
    scale_x, scale_w = (rng.uniform(0.5, 2, (rows, 1)).astype(np.float32) for rows in (m, n))
    bias = rng.standard_normal(n).astype(np.float32)
    packed = PackedWeight(values, meta, scale_w if scheme.scaled else None, pattern, (n, k), scheme)
    block_scale, xs, ws = None, x, w
    if block:
        block_scale, of_w = _block_scales(rng, m, ks, block), _block_scales(rng, n, ks, block)
        packed = replace(packed, values=reference.pack_nibbles(values), block_scale=of_w)
        xs = reference.times_blocks(x, block_scale, block.columns)
        ws = reference.decompress(reference.stored_values(packed), meta, pattern.unit)
    y = (xs.astype(np.float64) @ ws.astype(np.float64).T).astype(np.float32)
    if scheme.scaled:
        y = (y * scale_x) * scale_w[:, 0]
    out = next(of for of, name in FLOATS.items() if name == problem.out)
    return Case(packed, x, block_scale, scale_x[:, 0] if scheme.scaled else None, bias, (y + bias).astype(out))


def _operand(form: Operand, x: Array, pattern: Pattern, block_scale: Array = None) -> Array:
    """x of a case as bytes in the layout that a kernel loads."""
    if form.tiled:
        return to_tiles(x, pattern)
    if form.block:
        return scaled_rows(reference.pack_nibbles(x), block_scale.view(np.uint8), form.block)
    values = np.ascontiguousarray(reference.lift(x, form.lift) if form.lift else x).view(np.uint8)
    return np.pad(values, ((0, 0), (0, form.pitch - values.shape[1])))


def arranged(problem: GemmProblem, packed: PackedWeight) -> dict[str, Array]:
    """The buffers of a weight on the current device, by name."""
    raw = replace(packed, values=packed.values.view(packed.dtype.raw))
    buffers = {**arch.of(problem).arrange(raw, np), **({} if packed.scale is None else {"scale": packed.scale.reshape(-1)})}
    return {name: cupy.asarray(buffer) for name, buffer in buffers.items()}


def multiplied(problem: GemmProblem, candidate: Candidate, ordinal: int) -> Array:
    """y [m, n] of the `case` of a problem, computed on the current device, `ordinal`, with whatever memory held before: NaN."""
    given, plan = case(problem), Plan(problem, candidate, ordinal)
    buffers = arranged(problem, given.packed)
    x = cupy.asarray(_operand(plan.operand, given.x, problem.pattern, given.block_scale))
    bias = cupy.asarray(given.bias)
    scale_x = None if given.scale_x is None else cupy.asarray(given.scale_x)
    y = cupy.full(given.y.nbytes, 0xFF, np.uint8)
    workspace, stream = cupy.empty(max(1, plan.bytes), np.uint8), cupy.cuda.get_current_stream().ptr
    base, addresses = workspace.data.ptr, {"scale": 0, **{name: buffer.data.ptr for name, buffer in buffers.items()}}
    arguments = (
        x.data.ptr, plan.operand.pitch, 0 if scale_x is None else scale_x.data.ptr, bias.data.ptr, CUDA_CODES["float32"],
        y.data.ptr, problem.n, base + plan.parts_at, counters(ordinal).of(stream) if plan.part_bytes else 0,
        base + plan.derived_at,
    )  # fmt: skip
    for launch in plan.launches:
        launch.bind((*addresses,))(stream, (*addresses.values(), *arguments))
    return y.get().view(given.y.dtype).reshape(given.y.shape)


# ---- the test --------------------------------------------------------------------------------------------------------


def kernels(candidate: Candidate) -> frozenset[Kernel]:
    """The kernels of a candidate."""
    return frozenset((config.source, tuple(config.defines().items())) for config in candidate)


def tested(problem: GemmProblem, candidate: Candidate, buffers: tuple[str, ...] | None, ordinal: int, name: str) -> Outcome:
    """Test the kernels of a candidate, in every candidate for the `SHAPES` that launches none but these.

    Args:
        name: of the kernels, for a report.
    """
    own, wanted = arch.of(problem), kernels(candidate)
    met: frozenset[Kernel] = frozenset()
    count = 0
    where = f"{name} on {_named(problem.device)}"
    for i, (m, n, k) in enumerate(SHAPES):
        if i >= ALWAYS and met == wanted:
            break
        device = replace(problem.device, sms=FEW_SMS.get((m, n, k), problem.device.sms))
        small = replace(problem, m=m, n=n, k=k * problem.pattern.unit, device=device)
        for launches in own.candidates(small, buffers):
            if not kernels(launches) <= wanted:
                continue
            told = f"{small}, {' + '.join(map(str, launches))}"
            try:
                y = multiplied(small, launches, ordinal)
            except (LaunchError, cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError) as error:
                if getattr(error, "status", 0) in CAPTURE_ERRORS:
                    raise UnsupportedError(
                        f"self-test: {problem} needs one on this device, which cannot run while a CUDA graph is captured;"
                        f" multiply {problem.m} tokens once before the capture"
                    ) from None
                return Outcome(False, f"{where}: {driver.one_line(error)}; {told}")
            right = case(small).y
            if len(wrong := np.argwhere(~(y == right))):
                row, column = map(int, wrong[0])
                return Outcome(
                    False,
                    f"{where}: {len(wrong)} of {y.size} elements of y are wrong, the first at row {row}, column {column}:"
                    f" expected {float(right[row, column])!r}, got {float(y[row, column])!r}; {told}",
                )
            met, count = met | kernels(launches), count + 1
    if met != wanted:
        return Outcome(False, f"{where}: no test product launches it, of {problem}")
    return Outcome(True, f"{where}: {count} products are right")


def _named(device: Device) -> str:
    """A device with its present driver, for which an outcome holds."""
    return f"{device.name}, compute capability {device.capability[0]}.{device.capability[1]}, driver {driver.release()}"


def folder(device: Device) -> Path:
    """Folder of the outcomes on a device with its present driver."""
    return env.cache_dir() / "self-test" / re.sub(r"[^A-Za-z0-9.]+", "-", _named(device))


def _stored(place: Path) -> Outcome | None:
    """The outcome in a file; None if there is none that can be read."""
    try:
        told = parse_json(place.read_bytes(), "self-test")
    except (OSError, FormatError):
        return None
    passed, text = told.get("passed"), told.get("text")
    return Outcome(passed, text) if isinstance(passed, bool) and isinstance(text, str) else None


def outcomes(device: Device) -> list[Outcome]:
    """All that are stored of a device with its present driver, failures first."""
    found = [_stored(place) for place in sorted(folder(device).glob("*.json"))]
    return sorted((outcome for outcome in found if outcome), key=lambda outcome: outcome.passed)


_known: dict[Path, bool] = {}


def passes(problem: GemmProblem, candidate: Candidate, buffers: tuple[str, ...] | None, ordinal: int) -> bool:
    """Whether the kernels of a candidate compute what NumPy does on the current device; tested now if they never were.

    Raises:
        SlideSparseError: the kernel stopped the GPU, which this process cannot use any more.
    """
    name = "+".join(dict.fromkeys(compiled(config, problem.device.capability).folder.name for config in candidate))
    place = folder(problem.device) / f"{name}.json"
    if (known := _known.get(place)) is None:
        if (outcome := _stored(place)) is None:
            outcome = tested(problem, candidate, buffers, ordinal, name)
            cache.replace_text(place, json.dumps({"passed": outcome.passed, "text": outcome.text}, indent=1) + "\n")
            try:
                cupy.cuda.get_current_stream().synchronize()
            except cupy.cuda.runtime.CUDARuntimeError as error:
                raise SlideSparseError(
                    f"self-test: {outcome.text}; this process cannot use the GPU any more ({driver.one_line(error)}): start it"
                    " again, and that kernel is left aside"
                ) from None
        known = _known[place] = outcome.passed
    return known


# ---- the choice ------------------------------------------------------------------------------------------------------


def passing(
    problem: GemmProblem, candidates: Iterable[Candidate], buffers: tuple[str, ...] | None, ordinal: int
) -> Iterator[Candidate]:
    """Those of the candidates, in order, whose kernels we ran on such a device, or that pass their test now."""
    trusted = arch.ran(problem)
    return (candidate for candidate in candidates if trusted or passes(problem, candidate, buffers, ordinal))


def best(problem: GemmProblem, buffers: tuple[str, ...] | None, ordinal: int) -> Candidate:
    """`tuned_store.best`, or the cheapest candidate whose kernels pass their test.

    Raises:
        UnsupportedError: none passes.
    """
    if arch.ran(problem):
        return tuned_store.best(problem, buffers)
    others = (candidate for _, candidate in tuned_store.ranked(problem, buffers))
    for candidate in passing(problem, itertools.chain([tuned_store.best(problem, buffers)], others), buffers, ordinal):
        return candidate
    way = "" if arch.of(problem).portable else "; SLIDESPARSE_PORTABLE=1 uses the kernel for every GPU"
    raise UnsupportedError(
        f"device: no kernel for {problem} passes its self-test on {problem.device.name}; `slidesparse doctor` tells what failed"
        f", please report it{way}"
    )


_decided: set[tuple[tuple[int, int], Scheme]] = set()
_lock = threading.Lock()


def device_for(ordinal: int, pattern: Pattern, scheme: Scheme) -> Device:
    """The current device, `ordinal`, as weights of this scheme are arranged for it, from now on to the end of the process.

    `portable` where the kernel made for its architecture was never run by us there, and fails for the first such weight.
    """
    device, key = Device(*device_facts(ordinal)), (device_facts(ordinal)[0], scheme)
    own = arch.for_capability(device.capability, device.portable, scheme)
    if own.portable or (own.source, device.capability) in arch.RAN or own.refuses(device.capability, scheme):
        return device
    with _lock:
        if key not in _decided:
            problem = GemmProblem(*SHAPES[0], pattern, scheme, "bfloat16", device)
            cheapest: dict[frozenset[Kernel], Candidate] = {}
            for _, candidate in tuned_store.ranked(problem):
                cheapest.setdefault(kernels(candidate), candidate)
            tried = itertools.islice(cheapest.values(), TRIED)
            if not any(passes(problem, candidate, None, ordinal) for candidate in tried):
                arch.LEFT_ASIDE.add(key)
            _decided.add(key)
    return replace(device, portable=key in arch.LEFT_ASIDE)
