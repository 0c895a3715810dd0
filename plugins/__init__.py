"""Lowerings from the ops of domain `qwen` to what each target executes, and native kernels.
Imports `graphs`, and of `runtimes` only what lists the kernels of a backend.
"""
