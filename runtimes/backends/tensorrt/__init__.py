"""Engines executed by TensorRT and TensorRT-RTX, through the driver.
One stream and one set of weights per bundle.
"""
