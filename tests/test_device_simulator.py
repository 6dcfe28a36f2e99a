"""The Numba kernels of slidesparse_nb.cuda in Numba's CUDA simulator: their logic, without a GPU, every index checked.

The simulator is chosen when Numba is imported, so this file runs itself once more in a process of its own.
"""

from __future__ import annotations

import numpy as np
import pytest
from simulator import SIMULATED, run_in_simulator

pytest.importorskip("numba_cuda", reason="the kernels are Numba CUDA's: pip install 'slidesparse_nb[cuda13]'")

if not SIMULATED:

    @pytest.mark.slow
    def test_the_kernels_in_the_simulator() -> None:
        run_in_simulator(__file__)

else:
    from device_cases import SOURCES, awkward_rows, bits, imaged, quantized, same, same_weight

    from slidesparse_nb import packing
    from slidesparse_nb.arch.operand import STAGE, stages
    from slidesparse_nb.core import reference
    from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT8, FLOAT16, FLOATS, INT8, PACKED
    from slidesparse_nb.core.pattern import Pattern
    from slidesparse_nb.cuda import pack as weights
    from slidesparse_nb.cuda import quantize as activations
    from slidesparse_nb.cuda.jit import numba as numba_kernel
    from slidesparse_nb.cuda.kernels import numbers as elements
    from slidesparse_nb.cuda.kernels import ptx
    from slidesparse_nb.errors import OperandError, PatternError

    def at_address(x, offset=0, pitch=None):
        """x copied to a 16-byte aligned address plus `offset`, rows `pitch` bytes apart."""
        pitch = pitch or x.shape[1] * x.itemsize
        memory = np.full(x.shape[0] * pitch + 32, 0x7F, np.uint8)
        start = -memory.ctypes.data % 16 + offset
        placed = np.ndarray(x.shape, x.dtype, memory, start, (pitch, x.itemsize))
        placed[...] = x
        return placed

    def laid_out(x, layout):
        """x [m, 32] of a 16-bit type, or no columns or rows of it, in a layout that kernels must not stumble over."""
        return {
            "odd address": at_address(x, offset=2),
            "padded rows": at_address(x, pitch=72),
            "transposed": np.asfortranarray(x),
            "every second": np.repeat(x, 2, axis=1)[:, ::2],
            "no columns": x[:, :0],
            "no rows": x[:0],
        }[layout]

    # ---- activations ---------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", [INT8, FLOAT8], ids=str)
    @pytest.mark.parametrize("source", SOURCES, ids=str)
    @pytest.mark.parametrize(("k", "pattern"), [(16, None), (40, None), (37, None), (48, "6:8"), (24, "4:6"), (7, "2:4")])
    def test_quantize(source, dtype, k, pattern) -> None:
        pattern = None if pattern is None else Pattern.of(pattern)
        x = awkward_rows(12, k, source)
        values, scale = activations.quantize(at_address(x), dtype, pattern=pattern)
        same(values, scale, quantized(x, dtype, pattern, activations.row_pitch(k, pattern)))

    @pytest.mark.parametrize(("m", "k"), [(0, 8), (3, 0), (2, 1), (0, 0), (1, 5)])
    def test_quantize_almost_nothing(m, k) -> None:
        x = awkward_rows(m, k, BFLOAT16.numpy)
        same(*activations.quantize(x, INT8), quantized(x, INT8, None, activations.row_pitch(k)))

    @pytest.mark.parametrize("vectors", [1, 2, 4, 8])
    def test_every_number_of_vectors(vectors) -> None:
        k = 8 * 32 * vectors - 40  # the last thread has nothing, the one before not all
        x = at_address(awkward_rows(2, k, BFLOAT16.numpy))
        for pattern in (None, Pattern(6, 8)):
            width = activations.row_pitch(k, pattern)
            launch = activations.plan("bfloat16", "int8", k, x.strides, True, 90, pattern, width=width, vectors=vectors)
            assert (launch.variant.vectors, launch.threads) == (vectors, 32)
            values, scale = np.full((2, width), 0x55, np.uint8), np.zeros((2, 1), np.float32)
            launch(2, x, values, scale)
            same(values, scale, quantized(x, INT8, pattern, width))

    @pytest.mark.parametrize("architecture", [80, 89, 90])
    def test_every_architecture(architecture) -> None:
        for source in SOURCES:
            x, name = at_address(awkward_rows(12, 32, source)), FLOATS[source]
            launch = activations.plan(name, "float8_e4m3fn", 32, x.strides, True, architecture, width=32)
            assert launch.variant.architecture == architecture
            values, scale = np.full((12, 32), 0x55, np.uint8), np.zeros((12, 1), np.float32)
            launch(12, x, values, scale)
            same(values, scale, quantized(x, FLOAT8, None, 32))

    # ---- tiles ---------------------------------------------------------------------------------------------------

    TILES = [(source, dtype) for dtype in PACKED for source in (*SOURCES, dtype.numpy) if source != dtype.numpy or dtype.qmax]

    @pytest.mark.parametrize(("source", "dtype"), [*TILES, (BFLOAT16.numpy, BFLOAT16), (FLOAT16.numpy, FLOAT16)], ids=str)
    @pytest.mark.parametrize("pattern", ["2:4", "4:6", "6:8", "8:10", "14:16"])
    def test_tiles(source, dtype, pattern) -> None:
        pattern = Pattern.of(pattern)
        for m, k in ((3, 80), (2, 37)):  # whole vectors, and not
            x = awkward_rows(m, k, FLOAT16.numpy if source.itemsize == 1 else source)
            if source.itemsize == 1:
                with np.errstate(invalid="ignore"):
                    x = reference.quantize(x, dtype)[0]
            made, scale = activations.tiles(at_address(x), dtype, pattern)
            expected, expected_scale = imaged(x, dtype, pattern)
            np.testing.assert_array_equal(made, expected)
            assert (scale is None) == (expected_scale is None)
            if scale is not None:
                np.testing.assert_array_equal(bits(scale), bits(expected_scale))

    @pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
    @pytest.mark.parametrize("pattern", [*(f"{2 * n}:{2 * n + 2}" for n in range(1, 12)), "62:64", "64:66", "254:256"])
    def test_tiles_of_every_phase(pattern, dtype) -> None:
        """Several chunks a thread, of patterns whose windows repeat after 2 to 22 chunks, or not within 32."""
        pattern = Pattern.of(pattern)
        x = at_address(np.arange(1032, dtype=np.uint16).reshape(1, 1032).astype(BFLOAT16.numpy))
        launch = activations.plan("bfloat16", dtype.name, 1032, x.strides, True, 90, pattern, vectors=8)
        assert launch.variant.steady == (pattern.group not in (64, 256))
        made = np.full((stages(pattern, 1032, dtype), 1, 8, STAGE), 0x55, np.uint8)
        scale = np.zeros((1, 1), np.float32)
        launch(1, x, made, scale)
        np.testing.assert_array_equal(made, imaged(x, dtype, pattern)[0])
        if dtype is INT8:
            values, scale = activations.quantize(x, dtype, pattern=pattern, pitch=64)
            same(values, scale, quantized(x, dtype, pattern, activations.row_pitch(1032, pattern, 64)))

    @pytest.mark.parametrize("layout", ["odd address", "padded rows", "transposed", "every second", "no columns", "no rows"])
    @pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
    def test_tiles_strides(layout, dtype) -> None:
        x = awkward_rows(9, 32, FLOAT16.numpy)
        placed = laid_out(x, layout)
        made, _ = activations.tiles(placed, dtype, Pattern(6, 8))
        np.testing.assert_array_equal(made, imaged(placed, dtype, Pattern(6, 8))[0])

    def test_tiles_into_given_arrays() -> None:
        x = at_address(awkward_rows(3, 24, BFLOAT16.numpy))
        count = stages(Pattern(6, 8), 24, INT8)
        out, scale = np.full((count, 1, 8, 128), 0x55, np.uint8), np.zeros((3, 1), np.float32)
        given = activations.tiles(x, INT8, Pattern(6, 8), out=out, scale=scale)
        assert given[0] is out
        assert given[1] is scale
        np.testing.assert_array_equal(out, imaged(x, INT8, Pattern(6, 8))[0])
        with pytest.raises(OperandError, match=r"out: uint8 \(\d, 1, 8, 128\) must be a contiguous \(\d, 2, 8, 128\) array"):
            activations.tiles(at_address(awkward_rows(9, 24, BFLOAT16.numpy)), INT8, Pattern(6, 8), out=out)
        with pytest.raises(OperandError, match="x: int8 must hold bfloat16, or be bfloat16, float16 or float32"):
            activations.tiles(np.zeros((2, 8), np.int8), BFLOAT16, Pattern(6, 8), source=BFLOAT16)

    @pytest.mark.parametrize("layout", ["odd address", "padded rows", "transposed", "every second"])
    def test_quantize_strides(layout) -> None:
        x = awkward_rows(9, 32, FLOAT16.numpy)
        placed = laid_out(x, layout)
        same(*activations.quantize(placed, FLOAT8, pitch=64), quantized(x, FLOAT8, None, 64))

    def test_long_rows_are_read_twice() -> None:
        k = 8192 * 8 + 8
        launch = activations.plan("bfloat16", "int8", k, (2 * k, 2), True, 90, width=activations.row_pitch(k))
        assert launch.variant.vectors == 0
        launch = activations.plan("bfloat16", "int8", k - 16, (2 * k - 32, 2), True, 90, width=k - 16)
        assert (launch.variant.vectors, launch.threads) == (8, 1024)

    def test_float8_without_the_instruction() -> None:
        """The bit arithmetic for sm_80 to sm_87, over every float8 value, the halves between, and both neighbours of those."""
        grid = np.arange(0x7F, dtype=np.uint8).view(FLOAT8.numpy).astype(np.float32)
        halves = (grid[1:] + grid[:-1]) / 2
        points = np.concatenate([grid, halves, np.nextafter(halves, np.float32(0)), np.nextafter(halves, np.float32(1e9))])
        points = np.concatenate([points, -points, np.float32([448.00003, -463.9, 1e-30, 2.0**-149])])
        got = [int(elements.to_float8(v)) for v in points]
        np.testing.assert_array_equal(got, np.clip(points, -448, 448).astype(FLOAT8.numpy).view(np.uint8))
        assert elements.to_float8x4_early(*points[200:204]) == ptx.to_float8x4(*points[200:204])

    def test_quantize_into_given_arrays() -> None:
        x = at_address(awkward_rows(3, 24, BFLOAT16.numpy))
        out, scale = np.full((3, 32), 0x55, np.int8), np.zeros((3, 1), np.float32)
        given = activations.quantize(x, INT8, out=out, scale=scale)
        assert given[0] is out
        assert given[1] is scale
        same(out, scale, quantized(x, INT8, None, 32))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"x": np.zeros((2, 3))}, "x: float64 cannot be quantized; it must be bfloat16, float16 or float32"),
            ({"x": np.zeros(3, np.float32)}, r"x: shape \(3,\) must be \[m, k\]"),
            ({"dtype": FLOAT16}, "dtype: float16 is not quantized to"),
            ({"pitch": 8}, "pitch: 8 bytes must be a positive multiple of 16"),
            ({"out": np.zeros((2, 3), np.int8)}, r"out: int8 \(2, 3\) must be a contiguous \(2, 16\) array"),
            ({"scale": np.zeros((2, 1))}, r"scale: float64 \(2, 1\) must be a contiguous \(2, 1\) array of 4-byte"),
        ],
    )
    def test_quantize_refuses(change, words) -> None:
        with pytest.raises(OperandError, match=words):
            activations.quantize(**{"x": np.zeros((2, 3), np.float32), "dtype": INT8} | change)

    # ---- weights -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", PACKED, ids=str)
    @pytest.mark.parametrize("source", SOURCES, ids=str)
    @pytest.mark.parametrize("pattern", ["2:4", "4:6", "6:8", "14:16"])
    def test_pack(pattern, source, dtype) -> None:
        pattern = Pattern.of(pattern)
        for k in (37,) if dtype is FLOAT16 else (5, 48):
            w = np.random.default_rng(k).standard_normal((3, k)).astype(source)
            w[1, ::3] = -0.0
            w[2, 1::2] = w[2, 0]  # equal scores
            expected = reference.pack(reference.prune(w, pattern), pattern, dtype)
            packed = weights.pack(w, pattern, dtype, prune="magnitude")
            same_weight(packed, expected)
            np.testing.assert_array_equal(
                weights.unpack(packed)[0].view(dtype.raw), reference.unpack(expected).view(dtype.raw) & -1 % 2**dtype.bits
            )
            already = weights.pack(reference.prune(w, pattern), pattern, dtype)
            same_weight(already, expected)

    @pytest.mark.parametrize("dtype", [INT8, FLOAT8], ids=str)
    def test_pack_quantized(dtype) -> None:
        pattern = Pattern(6, 8)
        stored = np.random.default_rng(3).integers(0, 256, (4, 40), np.uint8)
        stored[stored & 0x7F == 0x7F] = 0x80
        w, scale = stored.view(dtype.numpy), np.float32([[1], [0], [0.5], [3e38]])
        expected = reference.pack(reference.prune(w, pattern), pattern, dtype, scale)
        same_weight(weights.pack(stored, pattern, dtype, scale=scale, prune="magnitude"), expected)

    def test_pack_defaults() -> None:
        w = np.random.default_rng(7).standard_normal((3, 16)).astype(np.float32)
        same_weight(weights.pack(w, Pattern(14, 16), prune="magnitude"), packing.pack(w, "14:16", prune="magnitude"))
        q = np.ones((3, 6), np.int8)
        for scale in (2, [1, 2, 3], np.float64([[0.5]])):
            same_weight(
                weights.pack(q, Pattern(4, 6), scale=scale, prune="magnitude"),
                packing.pack(q, "4:6", scale=scale, prune="magnitude"),
            )

    def test_pack_by_scores_of_strided_weights() -> None:
        pattern = Pattern(4, 6)
        rng = np.random.default_rng(4)
        w = np.asfortranarray(rng.standard_normal((5, 25)).astype(np.float16))
        score = rng.random((5, 25), np.float32)
        expected = reference.pack(reference.prune(w, pattern, score), pattern, INT8)
        same_weight(weights.pack(w, pattern, INT8, prune=score), expected)

    @pytest.mark.parametrize(("n", "k"), [(0, 16), (3, 0), (0, 0)])
    def test_pack_almost_nothing(n, k) -> None:
        w = np.zeros((n, k), np.float32)
        same_weight(weights.pack(w, Pattern(6, 8), INT8), reference.pack(w, Pattern(6, 8), INT8))

    def test_pack_reports_violations() -> None:
        w = np.ones((3, 40), np.float32)
        w[0] = w[1, :16] = 0
        with pytest.raises(PatternError) as reference_error:
            reference.pack(w, Pattern(6, 8), INT8)
        with pytest.raises(PatternError) as error:
            weights.pack(w, Pattern(6, 8), INT8)
        assert str(error.value) == str(reference_error.value)
        assert (error.value.row, error.value.group, error.value.count) == (1, 2, 8)

    @pytest.mark.parametrize("prune", ["none", "magnitude"])
    @pytest.mark.parametrize("dtype", PACKED, ids=str)
    def test_pack_refuses_what_is_not_finite(dtype, prune) -> None:
        w = np.zeros((4, 40), np.float32)
        w[2, 17], w[3, 1] = -np.inf, np.nan
        with pytest.raises(OperandError, match=r"w: -inf at row 2, column 17; weights must be finite \(float32\)"):
            weights.pack(w, Pattern(6, 8), dtype, prune=prune)

    def test_pack_refuses_overflow_and_bad_scales() -> None:
        w = np.zeros((2, 8), np.float32)
        w[1, 3] = 70000
        with pytest.raises(OperandError, match=r"w: 70000\.0 at row 1, column 3 overflows float16; store it in another type"):
            weights.pack(w, Pattern(6, 8), FLOAT16)
        stored = np.zeros((2, 8), np.int8)
        with pytest.raises(OperandError, match=r"scale: -1\.0 at row 1 must be finite and not negative"):
            weights.pack(stored, Pattern(6, 8), INT8, scale=np.float32([[1], [-1]]))
        stored[1, 2] = 0x7F
        with pytest.raises(OperandError, match=r"w: nan at row 1, column 2; weights must be finite \(float8_e4m3fn\)"):
            weights.pack(stored.view(np.uint8), Pattern(6, 8), FLOAT8, scale=np.ones((2, 1), np.float32))

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            (
                {"w": np.zeros((2, 8), np.float64)},
                "w: float64 cannot be packed; it must be one of float32, float16, bfloat16, int8, float8_e4m3fn; convert it",
            ),
            (
                {"w": np.zeros((2, 8), np.uint8), "dtype": None},
                "of float8_e4m3fn weights pass the bits as uint8, and the dtype",
            ),
            (
                {"w": np.zeros((2, 8), np.int8), "dtype": FLOAT8},
                "dtype: int8 weights are quantized already and keep their type",
            ),
            (
                {"w": np.zeros((2, 8), np.int8), "scale": np.ones(3)},
                r"scale: shape \(3,\) must be \[2, 1\], \[2\], or one number",
            ),
            ({"w": np.zeros(8, np.float32)}, r"w: shape \(8,\) must be \[n, k\]"),
            ({"w": np.zeros((2, 8), np.int8)}, "scale: is missing; int8 weights are quantized already"),
            ({"scale": np.ones((2, 1), np.float32)}, "scale: float32 weights are quantized here and take none"),
            ({"prune": np.ones((2, 7), np.float32)}, r"prune: scores of shape \(2, 7\) must have one score a weight"),
        ],
    )
    def test_pack_refuses(given, words) -> None:
        with pytest.raises(OperandError, match=words):
            weights.pack(**{"w": np.zeros((2, 8), np.float32), "pattern": Pattern(6, 8), "dtype": INT8} | given)

    def test_the_simulator_checks_indices() -> None:
        memory = numba_kernel.Memory(np.zeros(4, np.uint16), np.dtype(np.uint32))
        with pytest.raises(IndexError, match="kernel index 2 is outside memory of 2 elements"):
            memory[2]
