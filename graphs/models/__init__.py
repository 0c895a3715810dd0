"""The model as ordinary PyTorch modules: the reference that compiled artifacts are compared with."""
