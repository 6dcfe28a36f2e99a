"""Kernels made at run time: CUDA C++ by NVRTC, Python by Numba, and the cache of what they made."""
