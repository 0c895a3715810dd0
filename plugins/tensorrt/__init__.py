"""The targets `tensorrt` and `tensorrt-rtx`: lowerings, plugins of engines, and the build of engines.
Engines are built without a GPU where the library can.
"""
