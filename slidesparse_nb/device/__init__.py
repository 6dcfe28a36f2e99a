"""What runs on a GPU: the only part of the library that imports CuPy or Numba CUDA."""
