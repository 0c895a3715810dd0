"""Graphs executed by ONNX Runtime: sessions, bindings, and the kernels that an installation has.
CPU, CUDA and DirectML.
"""
