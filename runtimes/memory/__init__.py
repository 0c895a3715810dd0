"""Memory of hosts and devices: buffers, mapped weights, and the CUDA driver by ctypes.
No file here depends on graphs.
"""
