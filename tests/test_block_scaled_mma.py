"""The block-scaled sparse instruction for float8, `mma.sp` of .kind::mxf8f6f4: a NumPy model, and what the self-test sees.

No GPU of ours has it. The model is the PTX ISA's tables; what a kernel gives it is checked against the reference, and every way
to give it wrongly must change the products that the self-test compares.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy_gpu import numpy_for_cupy
from test_arch_sm80 import LANE, PATTERNS, G, Q, mma_sp, simulated, weights

from slidesparse_nb.arch import sm80_layout
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import FLOAT8
from slidesparse_nb.core.packed import ORDERED_NIBBLES
from slidesparse_nb.core.problem import Device, GemmProblem
from slidesparse_nb.core.scheme import Scheme

UNIT = np.full(32, 0x7F7F7F7F, np.uint32)
"""The scale words of the kernel: 2^0 in every byte of every lane."""


def mma_sp_mxf8(a, e, b, scale_a=UNIT, scale_b=UNIT, selectors=((0, 0), (0, 0))):
    """D [16, 8] of one m16n8k64: registers a [32, 4], e [32], b [32, 4], words of scales [32] for A and for B.

    Selectors: (byte, thread) of A and of B. Lanes 2 thread and 2 thread + 1 of quad g give the scales of A's rows g and g + 8,
    lane `thread` of quad g that of B's column g.
    """
    (byte_a, thread_a), (byte_b, thread_b) = selectors
    row, column = np.zeros(16), np.zeros(8)
    for half in range(2):
        row[8 * half + np.arange(8)] = scale_a[4 * np.arange(8) + 2 * thread_a + half] >> 8 * byte_a & 255
    column[:] = scale_b[4 * np.arange(8) + thread_b] >> 8 * byte_b & 255
    return mma_sp(a, e, b, FLOAT8, 0) * 2.0 ** (row - 127)[:, None] * 2.0 ** (column - 127)


def unscaled(a, e, b, dtype, selector):
    """As the kernel calls it."""
    return mma_sp_mxf8(a, e, b)


# ---- operands as registers ---------------------------------------------------------------------------------------------


def registers(values, nibbles, x):
    """Stored values [16, 32], nibbles [16, 16] and x [8, 64], bytes -> a [32, 4], e [32], b [32, 4]."""
    r, i, j = np.arange(4)[None, :, None], np.arange(4), np.arange(8)
    a = values[G[:, None, None] + 8 * (r & 1), 16 * (r >> 1) + 4 * Q[:, None, None] + i]
    b = x[G[:, None, None] + 0 * r, 16 * r + 4 * Q[:, None, None] + i]
    e = nibbles[(G + 8 * (Q & 1))[:, None], 8 * (Q >> 1)[:, None] + j].astype(np.uint32) << 4 * j.astype(np.uint32)
    return *(np.ascontiguousarray(part).view(np.uint32)[..., 0] for part in (a, b)), np.bitwise_or.reduce(e, axis=1)


def operands(seed=0):
    """Random ones of one instruction, and the dense 2:4 matrix [16, 64] and x [8, 64] that they hold."""
    rng = np.random.default_rng(seed)
    values, x = ((rng.integers(1, 5, s) * rng.choice((-1, 1), s)).astype(FLOAT8.numpy) for s in ((16, 32), (8, 64)))
    nibbles = rng.choice(np.array(ORDERED_NIBBLES, np.uint8), (16, 16))
    dense = reference.decompress(values, nibbles[:, 0::2] | nibbles[:, 1::2] << 4).astype(np.float64)
    a, b, e = registers(values.view(np.uint8), nibbles, x.view(np.uint8))
    return (a, e, b), dense, x.astype(np.float64)


@pytest.mark.parametrize("thread_a", [0, 1])
@pytest.mark.parametrize("thread_b", range(4))
@pytest.mark.parametrize("byte", range(4))
def test_scales_come_from_the_lanes_and_bytes_that_are_selected(byte, thread_a, thread_b):
    """Other lanes and bytes hold NaN, 0xff, which is never read; a selector, lane or byte off by one is seen."""
    (a, e, b), dense, x = operands()
    rng = np.random.default_rng(byte)
    row, column = rng.permutation(np.arange(120, 136)), rng.permutation(np.arange(124, 132))
    words = np.full((2, 32), 0xFFFFFFFF, np.uint32)
    blank = np.uint32(~(0xFF << 8 * byte) & 0xFFFFFFFF)
    for lane in LANE:
        if Q[lane] >> 1 == thread_a:
            words[0, lane] = (words[0, lane] & blank) | np.uint32(row[G[lane] + 8 * (Q[lane] & 1)]) << np.uint32(8 * byte)
        if Q[lane] == thread_b:
            words[1, lane] = (words[1, lane] & blank) | np.uint32(column[G[lane]]) << np.uint32(8 * byte)
    want = (dense * 2.0 ** (row - 127.0)[:, None]) @ (x * 2.0 ** (column - 127.0)[:, None]).T
    right = ((byte, thread_a), (byte, thread_b))
    np.testing.assert_array_equal(mma_sp_mxf8(a, e, b, *words, right), want)
    wrong = [
        (words, (((byte + 1) % 4, thread_a), right[1])),
        (words, ((byte, 1 - thread_a), right[1])),
        (words, (right[0], ((byte + 1) % 4, thread_b))),
        (words, (right[0], (byte, (thread_b + 1) % 4))),
        (words[:, LANE ^ 1], right),
        (words[:, LANE ^ 4], right),
        (words[::-1], right),
    ]
    for given, selectors in wrong:
        assert (mma_sp_mxf8(a, e, b, *given, selectors) != want).any()
        np.testing.assert_array_equal(mma_sp_mxf8(a, e, b, UNIT, UNIT, selectors), dense @ x.T)  # what makes 1 safe


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_kernel_through_the_instruction(pattern):
    rng = np.random.default_rng(2)
    packed = weights(rng, 19, sm80_layout.layout(pattern, 8).columns + 3, pattern, FLOAT8)
    x = rng.standard_normal((8, packed.k)).astype(FLOAT8.numpy)
    want = x.astype(np.float64) @ reference.unpack(packed).astype(np.float64).T
    np.testing.assert_allclose(simulated(x, sm80_layout.arrange(packed), packed, unscaled), want, rtol=1e-12, atol=1e-9)


# ---- what the self-test sees -------------------------------------------------------------------------------------------


def swapped(array, one, other):
    """A copy with two items of the first axis swapped."""
    made = array.copy()
    made[[one, other]] = array[[other, one]]
    return made


def one_nibble(e):
    """Lane 31's last nibble, only where it is (2, 3), becomes (1, 3)."""
    made = e.copy()
    made[31] ^= np.uint32(3 << 28 if made[31] >> 28 == 14 else 0)
    return made


MUTATIONS = {
    "values of two lanes": lambda a, e, b: (swapped(a, 30, 31), e, b),
    "rows of A": lambda a, e, b: (a[:, [1, 0, 3, 2]], e, b),
    "halves of k of A": lambda a, e, b: (a[:, [2, 3, 0, 1]], e, b),
    "metadata of two lanes": lambda a, e, b: (a, swapped(e, 0, 1), b),
    "halves of metadata": lambda a, e, b: (a, e >> 16 | e << 16, b),
    "one nibble": lambda a, e, b: (a, one_nibble(e), b),
    "two registers of B in one lane": lambda a, e, b: (a, e, np.where(LANE[:, None] == 5, b[:, [0, 1, 3, 2]], b)),
    "two columns of B": lambda a, e, b: (a, e, b[LANE ^ 4]),
    "bytes of a window": lambda a, e, b: (a, e, b >> 16 | b << 16),
}


@pytest.fixture(scope="module")
def case():
    """The first 8 tokens and 16 outputs of the self-test: x, arranged weights, the packed weight, y before scales and bias."""
    with pytest.MonkeyPatch.context() as patch, numpy_for_cupy(patch, True) as gpu:
        problem = GemmProblem(*gpu.self_test.SHAPES[1], PATTERNS[2], Scheme.of("fp8"), "float32", Device((12, 0), 84))
        made = gpu.self_test.case(problem)
        packed, x = made.packed.rows(0, 16), made.x[:8]
    y = x.astype(np.float64) @ reference.unpack(packed).astype(np.float64).T
    return x, sm80_layout.arrange(packed), packed, y


def test_the_self_test_passes_a_right_instruction(case):
    *given, y = case
    np.testing.assert_array_equal(simulated(*given, unscaled), y)


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_self_test_sees(name, case):
    def mutated(a, e, b, dtype, selector):
        return mma_sp_mxf8(*MUTATIONS[name](a, e, b))

    *given, y = case
    assert (simulated(*given, mutated) != y).any()


@pytest.mark.parametrize("words", [UNIT << np.uint32(1), np.where(LANE == 9, 0x7F7F7F80, UNIT)], ids=["all", "one lane"])
def test_the_self_test_sees_a_scale_that_is_not_one(words, case):
    *given, y = case
    assert (simulated(*given, lambda a, e, b, *_: mma_sp_mxf8(a, e, b, words.astype(np.uint32))) != y).any()
