"""Lowerings to standard ONNX operators, for the targets `onnx` and `directml`."""
