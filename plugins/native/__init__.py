"""Our own CUDA kernels for ONNX Runtime, and where to find the library built from them."""
