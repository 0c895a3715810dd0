"""The target `onnxruntime`: lowerings to kernels of ONNX Runtime and of our plugin, per device.
`onnxruntime_choices.py` lists the ways to lower each op.
"""
