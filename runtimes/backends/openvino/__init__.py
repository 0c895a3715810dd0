"""OpenVINO: runs the graphs of target `onnx`, which are standard ONNX, when it is asked for."""
