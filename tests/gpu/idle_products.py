"""Products that begin on an idle GPU, with weights that no cache holds: blocks wait for bytes that they find in a graph.

A program for test_gemm.py, which ends it if a product never ends. Its argument: cycles for which the Hopper kernel's producers
pause when they have requested what they may before x is there, so that consumers are done with it before producers go on.
"""

import dataclasses
import itertools
import shutil
import sys
import tempfile
from pathlib import Path

import cupy as cp
import numpy as np
from gemm_cases import on_gpu, tokens, weight

import slidesparse_nb as ss
from slidesparse_nb.core.dtypes import BFLOAT16, INT8
from slidesparse_nb.cuda.jit import cache as jit

SHAPES = (3072, 3072), (4608, 3584), (3072, 8192)
TOKENS, LAUNCHES = (1, 2, 8, 16, 64, 200), 200


def multiply(packed, x):
    """x, and zeros, times each of these equal weights in turn, product by product: always the same bits."""
    y, differing = cp.empty((len(x), packed[0].n), BFLOAT16.numpy), cp.zeros((), cp.int64)
    for given, quantized in itertools.product((x, cp.zeros_like(x)), (False, True)):
        operand = ss.quantize(given, packed[0]) if quantized else given
        first = ss.matmul(operand, packed[0], out_dtype=BFLOAT16.numpy).view(np.uint16)
        for i in range(LAUNCHES):
            cp.cuda.Device().synchronize()
            ss.matmul(operand, packed[i % len(packed)], out=y)
            cp.cuda.Device().synchronize()
            differing += (y.view(np.uint16) != first).sum()
    return int(differing)


def let_producers_pause(folder, cycles):
    """The kernels are compiled from a copy of their source in `folder`, where producers pause."""
    sources = shutil.copytree(jit.source_folder(), folder, dirs_exist_ok=True)
    file, marked = Path(sources, "sm90", "producer.cuh"), "        const bool ends = "
    text = file.read_text()
    assert text.count(marked) == 1
    pause = f"for (i64 began = clock64(); clock64() - began < {cycles};);"
    file.write_text(text.replace(marked, f"        {pause}\n{marked}"))
    jit.source_folder = lambda: Path(sources)


def main():
    rng, l2 = np.random.default_rng(41), cp.cuda.Device().attributes["L2CacheSize"]
    for n, k in SHAPES:
        made = weight(rng, n, k, "6:8", INT8)
        packed = [dataclasses.replace(made) for _ in range(2 * l2 // made.nbytes + 1)]
        for m in TOKENS:
            print(n, k, m, flush=True)
            assert multiply(packed, on_gpu(tokens(rng, m, k, BFLOAT16.numpy))) == 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        if cycles := int(sys.argv[1]):
            let_producers_pause(folder, cycles)
        main()
