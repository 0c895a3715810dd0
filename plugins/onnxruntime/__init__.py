"""Lowerings of the qwen ops to the kernels of ONNX Runtime."""
