"""Lowerings from the ops of domain `qwen` to what each target executes, and native kernels.
Imports `graphs`, and of `runtimes` only what asks a backend for its kernels.
"""
