"""The ops of domain qwen in native layers of TensorRT, and the compilation of a lowered graph to an engine."""
