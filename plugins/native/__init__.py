"""Kernels in C++ and CUDA, and where the compiled libraries are found.
Built by `build.sh`, `build_ptx.sh` and `cpu/build.sh`.
"""
