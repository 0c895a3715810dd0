"""OpenVINO on the CPU, for bundles of target `onnx`.
Its graphs are compiled when a bundle is loaded.
"""
