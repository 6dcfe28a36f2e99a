"""PTX that Numba has no name for: one instruction a function, its body the Python reference that the simulator runs.

Source: PTX ISA 9.0, the section named in each docstring. A word is 32 bits. Floats are float32, never fused,
and flushed only by the two instructions that approximate.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ...core.dtypes import BFLOAT16, FLOAT8
from ..jit.numba import SIMULATED, instruction, load_vector, store_vector

Word = Any
"""32 bits: a machine register, NumPy's uint32 or an int in the simulator."""
Float = Any
"""A float32."""

LANES = 1 if SIMULATED else 32
"""Threads that `warp_max` reduces over: the simulator has no warps, there every thread is one."""


# ---- memory ------------------------------------------------------------------------------------------------------


@load_vector("u32*", "i64", 2)
def load2(words: Any, i: Any) -> tuple[Word, Word]:
    """Words 2i and 2i+1 in one 8-byte load (ld.global.v2.u32)."""
    return words[2 * i], words[2 * i + 1]


@load_vector("u32*", "i64", 4)
def load4(words: Any, i: Any) -> tuple[Word, Word, Word, Word]:
    """Words 4i to 4i+3 in one 16-byte load (ld.global.v4.u32)."""
    return words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]


@store_vector("u32*", "i64", 2)
def store2(words: Any, i: Any, a: Word, b: Word) -> None:
    """Words 2i and 2i+1 in one 8-byte store (st.global.v2.u32)."""
    words[2 * i], words[2 * i + 1] = a, b


@store_vector("u32*", "i64", 4)
def store4(words: Any, i: Any, a: Word, b: Word, c: Word, d: Word) -> None:
    """Words 4i to 4i+3 in one 16-byte store (st.global.v4.u32)."""
    words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3] = a, b, c, d


@store_vector("u8*", "i64", 4)
def store4_in_bytes(octets: Any, i: Any, a: Word, b: Word, c: Word, d: Word) -> None:
    """Bytes 16i to 16i+15 in one store."""
    for place, word in enumerate((a, b, c, d)):
        for byte in range(4):
            octets[16 * i + 4 * place + byte] = word >> np.uint32(8 * byte) & np.uint32(0xFF)


# Atomics return the old value ("Parallel Synchronization and Communication: atom"). In the simulator a thread may be
# interrupted between reading and writing, but a block's threads only count and mark errors with them.


@instruction(
    "{.reg .u64 a; mad.lo.u64 a, $2, 8, $1; atom.global.min.u64 $0, [a], $3;}",
    "=l,l,l,l,~{memory}", "u64", "u64*", "u64", "u64", effect=True,
)  # fmt: skip
def atomic_min(words: Any, i: Any, value: int) -> int:
    """words[i] = min(words[i], value)."""
    old = int(words[i])
    words[i] = min(old, int(value))
    return old


@instruction(
    "{.reg .u64 a; mad.lo.u64 a, $2, 8, $1; atom.global.add.u64 $0, [a], $3;}",
    "=l,l,l,l,~{memory}", "u64", "u64*", "u64", "u64", effect=True,
)  # fmt: skip
def atomic_add(words: Any, i: Any, value: int) -> int:
    """words[i] += value."""
    old = int(words[i])
    words[i] = old + int(value)
    return old


# ---- order of grids ----------------------------------------------------------------------------------------------


@instruction("griddepcontrol.wait;", "~{memory}", "void", effect=True)
def wait_for_earlier_grids() -> None:
    """Wait until the grids before this one are complete and their writes visible ("griddepcontrol", sm_90)."""


@instruction("griddepcontrol.launch_dependents;", "~{memory}", "void", effect=True)
def launch_later_grid() -> None:
    """The grid after this one may start, once all blocks have said so ("griddepcontrol", sm_90)."""


# ---- clusters of blocks (sm_90) ----------------------------------------------------------------------------------


@instruction("barrier.cluster.arrive.relaxed;", "~{memory}", "void", effect=True)
def arrive_in_cluster() -> None:
    """Tell the cluster that this block has started, for which `cluster_max` waits ("barrier.cluster")."""


@functools.cache
def cluster_max(blocks: int) -> Any:
    """cluster_max(word): the largest word of a cluster of `blocks` blocks; `word` is the same in all threads of a block.

    All threads call it once, after `arrive_in_cluster`. Thread t of a block stores its word in the shared memory of
    block t ("mapa", "st.shared::cluster"). Not simulated.
    """
    others = "".join(f"ld.shared.u32 t, [here+{4 * i}]; max.u32 $0, $0, t; " for i in range(1, blocks))

    @instruction(
        f"{{.shared .align 16 .b32 peaks[{blocks}]; .reg .u32 here, there, t; .reg .pred sends; "
        f"mov.u32 here, peaks; mov.u32 there, %cluster_ctarank; mov.u32 t, %tid.x; setp.lt.u32 sends, t, {blocks}; "
        "mad.lo.u32 there, there, 4, here; @sends mapa.shared::cluster.u32 there, there, t; "
        "barrier.cluster.wait.acquire; @sends st.shared::cluster.u32 [there], $1; "
        f"barrier.cluster.arrive.release; barrier.cluster.wait.acquire; ld.shared.u32 $0, [here]; {others}}}",
        "=r,r,~{memory}", "u32", "u32", effect=True,
    )  # fmt: skip
    def largest(word: Word) -> Word:
        raise NotImplementedError

    return largest


# ---- bits and integers -------------------------------------------------------------------------------------------


@instruction("mov.b32 $0, $1;", "=f,r", "f32", "u32")
def as_float(word: Word) -> Float:
    """The float32 of these bits (mov.b32)."""
    return np.uint32(word).view(np.float32)


@instruction("mov.b32 $0, $1;", "=r,f", "u32", "f32")
def as_word(value: Float) -> Word:
    """The bits of this float32 (mov.b32)."""
    return int(np.float32(value).view(np.uint32))


@instruction("max.u32 $0, $1, $2;", "=r,r,r", "u32", "u32", "u32")
def larger(a: Word, b: Word) -> Word:
    """The larger of two words ("Integer Arithmetic: max")."""
    return max(int(a), int(b))


@instruction("max.u16x2 $0, $1, $2;", "=r,r,r", "u32", "u32", "u32")
def larger_halves(a: Word, b: Word) -> Word:
    """The larger low half and the larger high half of two words ("Integer Arithmetic: max", sm_90)."""
    return max(int(a) & 0xFFFF, int(b) & 0xFFFF) | max(int(a) >> 16, int(b) >> 16) << 16


@instruction("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", "u32", "u32", "u32", "u32")
def permute(a: Word, b: Word, selector: Word) -> Word:
    """Byte i is the one that nibble i of the selector names: 0 to 3 of a, 4 to 7 of b ("Data Movement: prmt")."""
    octets = int(a) | int(b) << 32
    return sum((octets >> 8 * (int(selector) >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4))


@instruction("prmt.b32 $0, $1, $2, 0x0040;", "=r,r,r", "u32", "u32", "u32")
def low_bytes(a: Word, b: Word) -> Word:
    """a's low byte, then b's ("Data Movement: prmt"); the upper half is undefined."""
    return int(a) & 0xFF | (int(b) & 0xFF) << 8


@instruction("prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", "u32", "u32", "u32")
def low_halves(a: Word, b: Word) -> Word:
    """a's low 16 bits, then b's ("Data Movement: prmt")."""
    return int(a) & 0xFFFF | (int(b) & 0xFFFF) << 16


@instruction("redux.sync.max.u32 $0, $1, 0xffffffff;", "=r,r", "u32", "u32", effect=True)
def warp_max(word: Word) -> Word:
    """The largest word of the warp, to all its lanes, which must all be here ("redux.sync", sm_80)."""
    return word


# ---- floats ------------------------------------------------------------------------------------------------------


@instruction("mul.rn.f32 $0, $1, $2;", "=f,f,f", "f32", "f32", "f32")
def multiply(a: Float, b: Float) -> Float:
    """a * b rounded; an explicit .rn is never fused with an addition ("Floating Point: mul")."""
    return np.float32(a) * np.float32(b)


@instruction("add.rn.f32 $0, $1, $2;", "=f,f,f", "f32", "f32", "f32")
def add(a: Float, b: Float) -> Float:
    """a + b rounded; an explicit .rn is never fused with a product ("Floating Point: add")."""
    return np.float32(a) + np.float32(b)


@instruction("div.rn.f32 $0, $1, $2;", "=f,f,f", "f32", "f32", "f32")
def divide(a: Float, b: Float) -> Float:
    """a / b correctly rounded ("Floating Point: div")."""
    return np.float32(a) / np.float32(b)


@instruction("sqrt.rn.f32 $0, $1;", "=f,f", "f32", "f32")
def square_root(a: Float) -> Float:
    """The root of a, correctly rounded ("Floating Point: sqrt")."""
    return np.sqrt(np.float32(a))


@instruction("ex2.approx.ftz.f32 $0, $1;", "=f,f", "f32", "f32")
def near_power_of_two(a: Float) -> Float:
    """2^a, at most 2 steps from correctly rounded ("Floating Point: ex2"); may differ by GPU; subnormal a count as 0."""
    return np.exp2(np.float32(a))


@instruction("rcp.approx.ftz.f32 $0, $1;", "=f,f", "f32", "f32")
def near_inverse(a: Float) -> Float:
    """1 / a, off by at most 1 step ("Floating Point: rcp"); may differ by GPU; subnormal a and results count as 0."""
    return np.float32(1) / np.float32(a)


@instruction(
    "{.reg .f32 s, t; mov.f32 s, $1; "
    + "".join(f"shfl.sync.bfly.b32 t, s, {half}, 31, 0xffffffff; add.rn.f32 s, s, t; " for half in (16, 8, 4, 2, 1))
    + "mov.f32 $0, s;}",
    "=f,f", "f32", "f32", effect=True,
)  # fmt: skip
def warp_sum(part: Float) -> Float:
    """The sum over a warp, to all its lanes: its upper half added to its lower, and so on ("shfl.sync"); not simulated."""
    raise NotImplementedError


@instruction("{.reg .b16 h, z; mov.b32 {h, z}, $1; cvt.f32.f16 $0, h;}", "=f,r", "f32", "u32")
def low_float16(word: Word) -> Float:
    """The float16 in a word's low half, as float32 ("Data Movement: cvt"); exact."""
    return np.float32(np.uint16(int(word) & 0xFFFF).view(np.float16))


@instruction("{.reg .b16 h, z; mov.b32 {z, h}, $1; cvt.f32.f16 $0, h;}", "=f,r", "f32", "u32")
def high_float16(word: Word) -> Float:
    """The float16 in a word's high half, as float32; exact."""
    return np.float32(np.uint16(int(word) >> 16).view(np.float16))


@instruction("{.reg .b16 h, z; mov.b16 z, 0; cvt.rn.f16.f32 h, $1; mov.b32 $0, {h, z};}", "=r,f", "u32", "f32")
def to_float16(value: Float) -> Word:
    """The bits of value rounded to float16, nearest even; what overflows becomes infinity ("cvt.rn.f16.f32")."""
    with np.errstate(over="ignore"):
        return int(np.float16(value).view(np.uint16))


@instruction("{.reg .b16 h, z; mov.b16 z, 0; cvt.rn.bf16.f32 h, $1; mov.b32 $0, {h, z};}", "=r,f", "u32", "f32")
def to_bfloat16(value: Float) -> Word:
    """The bits of value rounded to bfloat16, nearest even; what overflows becomes infinity ("cvt.rn.bf16.f32", sm_80)."""
    return int(np.asarray(value, np.float32).astype(BFLOAT16.numpy).view(np.uint16))


@instruction("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", "u32", "f32", "f32")
def to_bfloat16x2(low: Float, high: Float) -> Word:
    """`to_bfloat16` of two floats at once ("cvt.rn.bf16x2.f32", sm_80)."""
    return to_bfloat16(low) | to_bfloat16(high) << 16


@instruction("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", "u32", "f32", "f32")
def to_float16x2(low: Float, high: Float) -> Word:
    """`to_float16` of two floats at once ("cvt.rn.f16x2.f32", sm_80)."""
    return to_float16(low) | to_float16(high) << 16


@instruction(
    "{.reg .b16 l, z; mov.b16 z, 0; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; mov.b32 $0, {l, z};}",
    "=r,f,f", "u32", "f32", "f32",
)  # fmt: skip
def to_float8x2(a: Float, b: Float) -> Word:
    """The bits of two floats as float8_e4m3fn, nearest even, clipped to +-448, a lowest ("cvt.rn.satfinite.e4m3x2", sm_89)."""
    return int(np.clip(np.array([a, b], np.float32), -448, 448).astype(FLOAT8.numpy).view("<u2")[0])


@instruction(
    "{.reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; cvt.rn.satfinite.e4m3x2.f32 h, $4, $3; mov.b32 $0, {l, h};}",
    "=r,f,f,f,f", "u32", "f32", "f32", "f32", "f32",
)  # fmt: skip
def to_float8x4(a: Float, b: Float, c: Float, d: Float) -> Word:
    """The bits of four floats as float8_e4m3fn, nearest even, clipped to +-448, a lowest ("cvt.rn.satfinite.e4m3x2", sm_89)."""
    return int(np.clip(np.array([a, b, c, d], np.float32), -448, 448).astype(FLOAT8.numpy).view("<u4")[0])
