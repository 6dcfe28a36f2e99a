"""Packing on a device, in Numba's CUDA simulator: every way that the kernels load, prune and refuse, against the CPU's.

The simulator is chosen when Numba is imported, so this file runs itself once more in a process of its own.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from simulator import SIMULATED, run_in_simulator

pytest.importorskip("numba_cuda", reason="the kernels are Numba CUDA's: pip install 'slidesparse_nb[cuda13]'")

if not SIMULATED:

    @pytest.mark.slow
    def test_the_kernels_in_the_simulator() -> None:
        run_in_simulator(__file__)

else:
    from cases import drop_two, faulty, stored, stored_twice
    from device_cases import SOURCES, at_address, bits, same_weight
    from toy_pruner import Toy

    import slidesparse_nb.cuda
    from slidesparse_nb import packing
    from slidesparse_nb.core import prune as pruning
    from slidesparse_nb.core import reference
    from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT8, FLOAT16, INT8, PACKED
    from slidesparse_nb.core.packed import LARGEST_INT8_SLOTS
    from slidesparse_nb.core.pattern import Pattern
    from slidesparse_nb.cuda import pack as weights
    from slidesparse_nb.cuda.kernels import pack_stages as weight_kernels
    from slidesparse_nb.cuda.kernels.pack_stages import NIBBLES, NIBBLES_OF_LAST
    from slidesparse_nb.errors import FormatError, OperandError, PatternError

    pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in scalar:RuntimeWarning")  # modulo 2^64

    @pytest.fixture
    def on_device(monkeypatch):
        """The public functions take NumPy arrays for arrays on a device."""
        as_cupy = SimpleNamespace(as_cupy=lambda name, a: a)
        monkeypatch.setitem(sys.modules, "slidesparse_nb.cuda.arrays", as_cupy)
        monkeypatch.setattr(slidesparse_nb.cuda, "arrays", as_cupy, raising=False)
        monkeypatch.setattr(packing, "on_gpu", lambda a: isinstance(a, np.ndarray))

    def raised(call, *args, **options):
        """The error that a call raises."""
        with pytest.raises((OperandError, PatternError, FormatError)) as caught:
            call(*args, **options)
        return caught.value

    # ---- what is packed ------------------------------------------------------------------------------------------

    def test_table_of_nibbles() -> None:
        for mask in range(16):
            ws = np.array([[mask >> p & 1 for p in range(4)] + [0] * 4], np.int8)
            if ws.sum() <= 2:
                table = NIBBLES_OF_LAST if mask & 8 else NIBBLES
                assert int(table) >> 4 * (mask & 7) & 15 == reference.compress(ws)[1][0, 0] & 15

    METHODS = ["magnitude", "none", "random", "scores"]
    EVERY_WAY = [
        (METHODS[m], source, dtype)
        for m, (s, source), (d, dtype) in itertools.product(range(4), enumerate(SOURCES), enumerate(PACKED))
        if m == 0 or (m + s + d) % 2 == 0  # half of the types for each other method: what is pruned does not depend on them
    ]

    @pytest.mark.parametrize(("method", "source", "dtype"), EVERY_WAY, ids=str)
    def test_every_way_to_prune_and_to_load(method, source, dtype) -> None:
        seed = 2**64 - 3
        for pattern, k in ((Pattern(6, 8), 88), (Pattern(4, 6), 44), (Pattern(14, 16), 24), (Pattern(2, 4), 30)):
            w = np.random.default_rng(k).standard_normal((3, k)).astype(source)
            w[1, ::3] = -0.0
            w[2, 1::2] = w[2, 0]  # equal magnitudes
            if method == "none":
                w = reference.prune(w, pattern)
            score = np.random.default_rng(1).integers(0, 3, w.shape).astype(np.float32)
            prune = score if method == "scores" else method
            expected = packing.pack(w, pattern, dtype, prune=prune, seed=seed)
            for placed, offset in ((at_address(w), 0), (at_address(w, 4), 4), (at_address(w, 2, 2 * k * w.itemsize + 2), 2)):
                if offset % w.itemsize == 0:
                    same_weight(weights.pack(placed, pattern, dtype, prune=prune, seed=seed), expected)

    @pytest.mark.parametrize("dtype", [INT8, FLOAT8], ids=str)
    @pytest.mark.parametrize("method", ["magnitude", "random", "scores"])
    def test_quantized_weights_are_pruned_as_they_are(method, dtype) -> None:
        for pattern in (Pattern(6, 8), Pattern(4, 6), Pattern(2, 4)):
            q, scale = stored((3, 40), Pattern(30, 32), dtype), np.float32([[1], [0], [0.5]])
            q.view(np.uint8)[1, ::3] = 0x80
            prune = np.random.default_rng(1).random(q.shape, np.float32) if method == "scores" else method
            expected = packing.pack(q, pattern, dtype, scale=scale, prune=prune, seed=5)
            for given in (q.view(np.uint8), np.asfortranarray(q.view(np.uint8))):
                same_weight(weights.pack(given, pattern, dtype, scale=scale, prune=prune, seed=5), expected)

    @pytest.mark.parametrize(
        ("pattern", "k"),
        [("2:4", 8), ("6:8", 150), ("6:8", 128), ("14:16", 304), ("30:32", 304), ("62:64", 300), ("62:64", 320)],
    )
    def test_rows_of_several_pieces(pattern, k) -> None:
        """More slice units than threads; groups too long for registers; tails."""
        w = np.random.default_rng(k).standard_normal((2, k)).astype(BFLOAT16.numpy)
        pattern = Pattern.of(pattern)
        for dtype in (INT8, BFLOAT16):
            same_weight(weights.pack(w, pattern, dtype, prune="magnitude"), packing.pack(w, pattern, dtype, prune="magnitude"))

    @pytest.mark.parametrize(("n", "k"), [(0, 16), (3, 0), (0, 0)])
    def test_pack_almost_nothing(n, k) -> None:
        w = np.zeros((n, k), np.float32)
        same_weight(weights.pack(w, Pattern(6, 8), INT8), reference.pack(w, Pattern(6, 8), INT8))

    def test_which_loads_are_chosen() -> None:
        def chosen(k, group, dtype=np.uint16, offset=0, pitch=None):
            return weights._vector(at_address(np.zeros((2, k), dtype), offset, pitch), group)

        assert (chosen(64, 8), chosen(64, 8, np.float32), chosen(64, 16), chosen(64, 16, np.uint8)) == (4, 4, 4, 4)
        assert (chosen(64, 8, np.uint8), chosen(64, 4), chosen(60, 6), chosen(60, 8), chosen(64, 8, offset=4)) == (1,) * 5
        assert (chosen(64, 8, pitch=132), chosen(3, 4, np.float32)) == (1, 1)
        assert (chosen(63, 8), chosen(64, 8, offset=2), chosen(60, 6, np.uint8), chosen(64, 64), chosen(64, 8, pitch=130)) == (
            (0,) * 5
        )
        assert weights._vector(np.zeros((64, 64), np.uint16, order="F"), 8) == 0

    def test_float8_without_the_instruction(monkeypatch) -> None:
        monkeypatch.setattr("slidesparse_nb.cuda.quantize.native_float8", lambda device: False)
        w = np.random.default_rng(0).standard_normal((3, 40)).astype(BFLOAT16.numpy)
        w[1] *= 2.0 ** -np.arange(40)
        same_weight(weights.pack(w, Pattern(6, 8), FLOAT8, prune="magnitude"), packing.pack(w, "6:8", "fp8", prune="magnitude"))

    def test_names_tell_kernels_apart() -> None:
        variants = [
            weight_kernels.Variant(source, stored, windows, prune, vector, native)
            for source in weight_kernels.BITS
            for stored in PACKED
            for windows in (1, 3)
            for prune in weight_kernels.METHODS
            for vector in (0, 1, 4)
            for native in (True, False)
        ]
        assert len({v.name for v in variants}) == len(variants)

    # ---- scales and scores ---------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "scale",
        [0.5, np.array(0.5), np.full(3, 0.5, ml_dtypes.bfloat16), np.array([-0.0, 1e-45, 0]), np.float16([[1], [0], [2]])],
        ids=str,
    )
    def test_scales_of_every_type(scale) -> None:
        q = np.ones((3, 8), np.int8)
        same_weight(weights.pack(q, Pattern(10, 12), scale=scale), packing.pack(q, "10:12", scale=scale))

    @pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float64, np.float16, np.bool_, ml_dtypes.bfloat16])
    def test_scores_of_any_real_type(dtype) -> None:
        w = np.random.default_rng(0).standard_normal((2, 40)).astype(np.float32)
        score = np.random.default_rng(1).integers(0, 2, w.shape).astype(dtype)
        same_weight(weights.pack(w, Pattern(6, 8), prune=score), packing.pack(w, "6:8", prune=score))

    def test_minus_zero_is_a_score_like_zero() -> None:
        w = np.array([[1, 2, 3, 0, 4, 5, 6, 0]], np.float32)
        score = np.array([[-0.0, 0, 1, 1, 1, 1, 1, 1]])
        for dtype in (np.float32, np.float64, ml_dtypes.bfloat16):
            packed = weights.pack(w, Pattern(6, 8), FLOAT16, prune=score.astype(dtype))
            assert packing.unpack(packed).tolist() == w.tolist()

    @pytest.mark.parametrize("value", [-1, -1e-300, np.nan, -np.nan, np.inf, 1e300])
    @pytest.mark.parametrize(
        ("dtype", "stored"), [(np.float64, INT8), (np.float32, BFLOAT16), (ml_dtypes.bfloat16, INT8)], ids=str
    )
    def test_scores_are_refused_as_on_the_cpu(value, dtype, stored) -> None:
        w = np.ones((3, 40), np.float32)
        w[1] = 0
        score = np.ones(w.shape, dtype)
        with np.errstate(over="ignore"):
            score[1, 17] = score[2, 3] = value
        if score[1, 17] == 0:  # the type's own zero
            return
        wanted, got = raised(packing.pack, w, prune=score), raised(weights.pack, w, Pattern(6, 8), stored, prune=score)
        assert (type(got), str(got)) == (type(wanted), str(wanted))
        assert "at row 1, column 17 must be finite and not negative" in str(got)

    def test_methods_that_the_kernel_does_not_know(monkeypatch) -> None:
        monkeypatch.setitem(pruning.PRUNERS, "toy", Toy())
        norms = np.random.default_rng(1).random(40)
        for source in SOURCES:
            w = np.random.default_rng(0).standard_normal((3, 40)).astype(source)
            options = {"prune": "toy", "seed": 5, "statistics": norms}
            same_weight(weights.pack(w, Pattern(6, 8), INT8, **options), packing.pack(w, "6:8", INT8, **options))
        for options in ({"prune": "wanda"}, {"prune": "toy"}, {"prune": "random", "statistics": norms}):
            assert str(raised(weights.pack, w, Pattern(6, 8), **options)) == str(raised(packing.pack, w, **options))
        w[1, 2], options = np.nan, {"prune": "toy", "statistics": norms}
        assert str(raised(weights.pack, w, Pattern(6, 8), **options)) == str(raised(packing.pack, w, **options))

    # ---- the public functions ------------------------------------------------------------------------------------

    def test_the_public_pack_and_unpack(on_device) -> None:
        w = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
        for options in ({"prune": "random", "seed": -1}, {"prune": np.abs(w)}, {"prune": "magnitude"}):
            method = options["prune"] if isinstance(options["prune"], str) else "magnitude"
            score = pruning.uniform(-1, 0, *w.shape) if method == "random" else np.abs(w)
            expected = reference.pack(reference.prune(w, Pattern(6, 8), score), Pattern(6, 8), INT8)
            packed = packing.pack(w, "6:8", "int8", **options)
            same_weight(packed, expected)
            np.testing.assert_array_equal(packing.unpack(packed), reference.unpack(expected))

    def refusals():
        f32, i8 = np.ones((2, 8), np.float32), np.ones((2, 8), np.int8)
        bad = f32.copy()
        bad[1, 3], bad[1, 5] = np.nan, -np.inf
        large = np.full((2, 8), 1e5, BFLOAT16.numpy)
        sparse = reference.prune(np.random.default_rng(0).standard_normal((4, 128)).astype(np.float32), Pattern(6, 8))
        pieces = np.ones((3, 384), np.float32)
        for first in range(0, 384, 128):
            pieces[:, first : first + 128] = reference.prune(pieces[:, first : first + 128], Pattern(4, 6))
        minus = np.where(sparse == 0, np.float32(-0.0), sparse)
        long = np.zeros((1, LARGEST_INT8_SLOTS * 8 // 7 + 100), np.int8)
        yield from [
            (f32[0], {}), (f32[None], {}), (f32.astype(np.float64), {}), (i8.astype(np.int32), {}),
            (f32.astype(np.complex64), {}), (f32, {"dtype": "int4"}), (f32, {"pattern": "3:8"}), (f32, {"scale": 1}), (i8, {}),
            (i8, {"dtype": "bfloat16", "scale": 1}), (i8, {"scale": 1e-300}), (i8, {"scale": [1, -1e-300]}),
            (f32, {"prune": "largest"}), (f32, {"prune": None}), (f32, {"prune": [1, 2]}), (f32, {"seed": 1.5}),
            (f32, {"prune": "random", "seed": None}), (f32, {"prune": -f32}), (f32, {}), (i8, {"scale": 1}),
            (bad, {}), (bad, {"prune": "random"}), (bad, {"prune": "magnitude", "dtype": "int8"}),
            (bad.astype(BFLOAT16.numpy), {}), (bad.astype(FLOAT8.numpy), {"scale": 1}), (large, {"dtype": "float16"}),
            (-large, {"dtype": "float16", "prune": "magnitude"}), (sparse, {"pattern": "2:4"}), (minus, {"pattern": "2:4"}),
            (sparse.astype(np.float16), {"pattern": "2:4", "dtype": "fp8"}), (pieces, {"pattern": "4:6"}),
            (pieces.astype(FLOAT8.numpy), {"pattern": "4:6", "scale": 1}), (long, {"pattern": "14:16", "scale": 1}),
        ]  # fmt: skip
        scales = [np.ones(3), np.ones((1, 2)), [1, -1], np.nan, 1e39, "a", 10**400, [1, [2]], 1j, np.array([1, 1e-46])]
        scales += [np.ma.ones(2), np.array([1, 1j]), np.float64([[1], [np.inf]])]
        yield from ((i8, {"scale": scale}) for scale in scales)
        scores = [np.ones((2, 7)), np.ones((2, 8), complex), np.full((2, 8), "a"), np.full((2, 8), None)]
        yield from ((f32, {"prune": score}) for score in scores)

    @pytest.mark.parametrize(
        ("w", "options"), list(refusals()), ids=lambda v: "w" if isinstance(v, np.ndarray) else str(v)[:60]
    )
    def test_refusals_are_those_of_the_cpu(w, options, request) -> None:
        wanted = raised(packing.pack, w, **options)
        request.getfixturevalue("on_device")
        got = raised(packing.pack, w, **options)
        assert (type(got), str(got)) == (type(wanted), str(wanted))
        if isinstance(wanted, PatternError):
            assert (got.row, got.group, got.count) == (wanted.row, wanted.group, wanted.count)

    def test_hints_are_looked_for_in_blocks_of_rows(on_device, monkeypatch) -> None:
        monkeypatch.setattr(weights, "ELEMENTS_AT_ONCE", 100)
        w = drop_two(np.random.default_rng(0).standard_normal((7, 40)).astype(BFLOAT16.numpy), Pattern(6, 8))
        assert "they do obey 6:8" in str(raised(packing.pack, w, "4:6"))
        w[6] = 1
        assert "obey" not in str(raised(packing.pack, w, "4:6"))

    def test_raw_bits() -> None:
        bits, scale = np.full((2, 8), 0x7F, np.uint8), np.ones((2, 1), np.float32)
        message = str(raised(weights.pack, bits, Pattern(6, 8)))
        assert message.endswith("; of float8_e4m3fn weights pass the bits as uint8, and the dtype")
        message = str(raised(weights.pack, bits, Pattern(6, 8), FLOAT8, scale=scale))
        assert message == "w: nan at row 0, column 0; weights must be finite (float8_e4m3fn)"

    # ---- unpack --------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", PACKED, ids=str)
    @pytest.mark.parametrize("pattern", ["2:4", "4:6", "6:8", "14:16", "62:64"])
    @pytest.mark.parametrize("k", [1, 33, 320])
    def test_unpack(dtype, pattern, k) -> None:
        q = stored((3, k), Pattern.of(pattern), dtype)
        scale = np.ones((3, 1), np.float32) if dtype.bits == 8 else None
        dense, row = weights.unpack(reference.pack(q, Pattern.of(pattern), dtype, scale))
        assert row is None
        zero = (bits(q) & dtype.raw.type(dtype.nonzero_mask)) == 0
        np.testing.assert_array_equal(bits(dense), np.where(zero, 0, bits(q)))

    @pytest.mark.parametrize("dtype", PACKED, ids=str)
    @pytest.mark.parametrize("fault", ["twice", "index", "scale"])
    def test_unpack_refuses_what_the_cpu_refuses(fault, dtype, request) -> None:
        if (packed := faulty(dtype, fault)) is None:
            return
        wanted = raised(packing.unpack, packed)
        request.getfixturevalue("on_device")
        for values in (packed.values, packed.values.view(dtype.raw)):
            got = raised(packing.unpack, replace(packed, values=values))
            assert (type(got), str(got)) == (type(wanted), str(wanted))

    def test_unpack_takes_what_the_cpu_takes(on_device) -> None:
        """A stored -0.0, in a column that another window stores."""
        packed = stored_twice(BFLOAT16)
        packed.values.view(np.uint16)[packed.values.view(np.uint16) == bits(np.array(5, BFLOAT16.numpy))] = 0x8000
        np.testing.assert_array_equal(packing.unpack(packed).astype(np.float32), np.eye(4, 24, 17, np.float32) * 3)
