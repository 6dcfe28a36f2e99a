"""GPU kernels in Python (Numba CUDA): pack, unpack and quantize."""
