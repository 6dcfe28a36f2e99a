"""The kernel that lifts and quantizes to NVFP4 and MXFP4, in Numba's CUDA simulator, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from simulator import SIMULATED, run_in_simulator

from slidesparse_nb.core.scheme import Scheme

SCHEMES = [Scheme.of("NVFP4"), Scheme.of("MXFP4")]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=str)

pytest.importorskip("numba_cuda", reason="the kernels are Numba CUDA's: pip install 'slidesparse_nb[cuda13]'")

if not SIMULATED:

    def test_the_kernel_in_the_simulator() -> None:
        run_in_simulator(__file__)

    @schemes
    @pytest.mark.parametrize("source", ["bfloat16", "float16", "float32"])
    @pytest.mark.parametrize("vectors", [0, 1])
    def test_it_compiles_without_spills(source: str, vectors: int, scheme: Scheme, tmp_path, monkeypatch) -> None:
        from slidesparse_nb.core.dtypes import FLOAT4
        from slidesparse_nb.cuda.kernels.quantize import kernel
        from slidesparse_nb.cuda.kernels.quantize_stages import Variant

        monkeypatch.setenv("SLIDESPARSE_CACHE_DIR", str(tmp_path))
        for capability in ((12, 0), (12, 1)):
            built = kernel(Variant(source, FLOAT4.name, vectors, 3, False, 90, scheme.activations.block)).build(capability)
            assert (built.spills, built.stack) == (0, 0)

else:
    from device_cases import SOURCES, at_address, awkward_rows, blocked, same, write

    from slidesparse_nb.core import reference
    from slidesparse_nb.core.dtypes import FLOAT4
    from slidesparse_nb.core.pattern import Pattern
    from slidesparse_nb.cuda.kernels.numbers import to_float4

    def check(x, text, scheme) -> None:
        pattern = Pattern.of(f"{text} pairs")
        wanted, of_wanted = blocked(x, pattern, scheme)
        made, of_rows = np.full(wanted.shape, 0x55, np.uint8), np.zeros((len(x), 1), np.float32)
        write(x, FLOAT4, made, of_rows, pattern, made.shape[1], block=scheme.activations.block)
        same(made, of_rows, (wanted, of_wanted))

    @schemes
    @pytest.mark.parametrize("source", SOURCES, ids=str)
    @pytest.mark.parametrize(("text", "k"), [("2:4", 9), ("4:6", 60), ("6:8", 203), ("6:8", 192), ("8:10", 40), ("14:16", 300)])
    def test_the_references_bits(source, text, k, scheme) -> None:
        check(at_address(awkward_rows(12, k, source)), text, scheme)

    @pytest.mark.parametrize("place", ["odd address", "transposed", "every second", "no rows"])
    def test_strides(place) -> None:
        x = awkward_rows(9, 70, np.dtype(np.float16))
        check(
            {
                "odd address": at_address(x, offset=2),
                "transposed": np.asfortranarray(x),
                "every second": np.repeat(x, 2, axis=1)[:, ::2],
                "no rows": x[:0],
            }[place],
            "6:8",
            SCHEMES[0],
        )

    @schemes
    def test_products_above_the_limit(scheme) -> None:
        """Rows whose largest magnitude, times the inverse of its scale, rounds to more than the limit."""
        limit, x = np.float32(scheme.activations.limit), np.linspace(1, 2, 4096, dtype=np.float32)
        above = x[x * (limit / x) > limit][:6, None]
        assert len(above) == 6
        check(np.concatenate([above, -above, above / 3, above / 500], axis=1), "2:4", scheme)

    def test_to_float4() -> None:
        """Every value, every tie, their neighbours, and what is clipped, of both signs."""
        ties = np.array([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 1e30], np.float32)
        x = np.concatenate([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf))])
        x = np.concatenate([x, -x])
        wanted = np.clip(x, -6, 6).astype(FLOAT4.numpy)
        wanted = np.where(reference.is_nonzero(wanted), wanted, np.zeros((), FLOAT4.numpy)).view(np.uint8)
        assert [int(to_float4(v)) for v in x] == wanted.tolist()
