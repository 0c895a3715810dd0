"""Lowerings to operators of the ONNX standard, with fixed shapes.
The targets `onnx`, `directml` and TensorRT start from these.
"""
