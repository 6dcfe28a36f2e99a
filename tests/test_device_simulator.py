"""The Numba kernels of activations in Numba's CUDA simulator: their logic, without a GPU, every index checked.

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
    from device_cases import (
        SOURCES,
        at_address,
        awkward_rows,
        bits,
        launch_rows,
        made_on_device,
        plan_with,
        quantized,
        row_pitch,
        same,
        tiled,
        write,
    )
    from fused_cases import check_fused

    from slidesparse_nb.arch.operand import STAGE, stages
    from slidesparse_nb.core import reference
    from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT8, FLOAT16, FLOATS, INT8, PACKED
    from slidesparse_nb.core.pattern import Pattern
    from slidesparse_nb.cuda import quantize as activations
    from slidesparse_nb.cuda.jit import numba as numba_kernel
    from slidesparse_nb.cuda.kernels import numbers as elements
    from slidesparse_nb.cuda.kernels import ptx
    from slidesparse_nb.cuda.kernels.quantize import KINDS

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

    def check_rows(x, dtype, pattern=None, more=0):
        """x in rows of `more` bytes than they need, written over something else."""
        width = row_pitch(x.shape[1], pattern) + more
        values, scale = np.full((len(x), width), 0x55, np.uint8), np.zeros((len(x), 1), np.float32)
        write(x, dtype, values, scale, pattern, width)
        same(values, scale, quantized(x, dtype, pattern, width))

    @pytest.mark.parametrize("dtype", [INT8, FLOAT8], ids=str)
    @pytest.mark.parametrize("source", SOURCES, ids=str)
    @pytest.mark.parametrize(("k", "pattern"), [(16, None), (40, None), (37, None), (48, "6:8"), (24, "4:6"), (7, "2:4")])
    def test_quantize(source, dtype, k, pattern) -> None:
        check_rows(at_address(awkward_rows(12, k, source)), dtype, None if pattern is None else Pattern.of(pattern))

    @pytest.mark.parametrize(("source", "dtype"), [(BFLOAT16, INT8), (FLOAT16, FLOAT8), (BFLOAT16, BFLOAT16)], ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("m", "k", "pattern"), [(3, 72, "6:8"), (1, 2000, "4:6")])
    def test_norms_and_gates(kind, source, dtype, m, k, pattern) -> None:
        check_fused(kind, source, dtype, m, k, Pattern.of(pattern))

    @pytest.mark.parametrize(("m", "k"), [(0, 8), (3, 0), (2, 1), (0, 0), (1, 5)])
    def test_quantize_almost_nothing(m, k) -> None:
        x = awkward_rows(m, k, BFLOAT16.numpy)
        same(*made_on_device(x, INT8), quantized(x, INT8, None, row_pitch(k)))

    @pytest.mark.parametrize("vectors", [1, 2, 4, 8])
    def test_every_number_of_vectors(vectors) -> None:
        k = 8 * 32 * vectors - 40  # the last thread has nothing, the one before not all
        x = at_address(awkward_rows(2, k, BFLOAT16.numpy))
        for pattern in (None, Pattern(6, 8)):
            width = row_pitch(k, pattern)
            launch = plan_with(vectors, "bfloat16", "int8", k, x.strides, True, 90, pattern, width=width)
            assert (launch.variant.vectors, launch.threads) == (vectors, 32)
            values, scale = np.full((2, width), 0x55, np.uint8), np.zeros((2, 1), np.float32)
            launch_rows(launch, 2, x, values, scale)
            same(values, scale, quantized(x, INT8, pattern, width))

    @pytest.mark.parametrize("architecture", [80, 89, 90])
    def test_every_architecture(architecture) -> None:
        for source in SOURCES:
            x, name = at_address(awkward_rows(12, 32, source)), FLOATS[source]
            launch = activations.plan(name, "float8_e4m3fn", 32, x.strides, True, architecture, width=32)
            assert launch.variant.architecture == architecture
            values, scale = np.full((12, 32), 0x55, np.uint8), np.zeros((12, 1), np.float32)
            launch_rows(launch, 12, x, values, scale)
            same(values, scale, quantized(x, FLOAT8, None, 32))

    # ---- tiles ---------------------------------------------------------------------------------------------------

    TILES = [
        (source, dtype) for dtype in PACKED for source in (*SOURCES, dtype.numpy) if source != dtype.numpy or dtype.bits == 8
    ]

    @pytest.mark.parametrize(("source", "dtype"), [*TILES, (BFLOAT16.numpy, BFLOAT16), (FLOAT16.numpy, FLOAT16)], ids=str)
    @pytest.mark.parametrize("pattern", ["2:4", "4:6", "6:8", "8:10", "14:16"])
    def test_tiles(source, dtype, pattern) -> None:
        pattern = Pattern.of(pattern)
        for m, k in ((3, 80), (2, 37)):  # whole vectors, and not
            x = awkward_rows(m, k, FLOAT16.numpy if source.itemsize == 1 else source)
            if source.itemsize == 1:
                with np.errstate(invalid="ignore"):
                    x = reference.quantize(x, dtype)[0]
            expected, expected_scale = tiled(x, dtype, pattern)
            made, scale = (
                np.full(expected.shape, 0x55, np.uint8),
                None if expected_scale is None else np.zeros((m, 1), np.float32),
            )
            write(at_address(x), dtype, made, scale, pattern, source=dtype.name if source.itemsize == 1 else "")
            np.testing.assert_array_equal(made, expected)
            if scale is not None:
                np.testing.assert_array_equal(bits(scale), bits(expected_scale))

    @pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
    @pytest.mark.parametrize("pattern", [*(f"{2 * n}:{2 * n + 2}" for n in range(1, 12)), "62:64", "64:66", "254:256"])
    def test_tiles_of_every_phase(pattern, dtype) -> None:
        """Several chunks a thread, of patterns whose windows repeat after 2 to 22 chunks, or not within 32."""
        pattern = Pattern.of(pattern)
        x = at_address(np.arange(1032, dtype=np.uint16).reshape(1, 1032).astype(BFLOAT16.numpy))
        launch = plan_with(8, "bfloat16", dtype.name, 1032, x.strides, True, 90, pattern)
        assert launch.variant.steady == (pattern.group not in (64, 256))
        made = np.full((stages(pattern, 1032, dtype), 1, 8, STAGE), 0x55, np.uint8)
        scale = np.zeros((1, 1), np.float32)
        launch_rows(launch, 1, x, made, scale)
        np.testing.assert_array_equal(made, tiled(x, dtype, pattern)[0])
        if dtype is INT8:
            check_rows(x, dtype, pattern, 48)

    @pytest.mark.parametrize("layout", ["odd address", "padded rows", "transposed", "every second", "no columns", "no rows"])
    @pytest.mark.parametrize("dtype", [INT8, BFLOAT16], ids=str)
    def test_strides(layout, dtype) -> None:
        placed = laid_out(awkward_rows(9, 32, FLOAT16.numpy), layout)
        if dtype is INT8:
            check_rows(placed, FLOAT8, more=48)
        made, scale = made_on_device(placed, dtype, Pattern(6, 8))
        assert (scale is None) == (dtype is BFLOAT16)
        np.testing.assert_array_equal(made, tiled(placed, dtype, Pattern(6, 8))[0])

    def test_long_rows_are_read_twice() -> None:
        k = 8192 * 8 + 8
        launch = activations.plan("bfloat16", "int8", k, (2 * k, 2), True, 90, width=row_pitch(k))
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

    def test_the_simulator_checks_indices() -> None:
        memory = numba_kernel.Memory(np.zeros(4, np.uint16), np.dtype(np.uint32))
        with pytest.raises(IndexError, match="kernel index 2 is outside memory of 2 elements"):
            memory[2]
