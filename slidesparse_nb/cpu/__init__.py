"""Numba on the CPU: the kernels of packing, and the product."""
