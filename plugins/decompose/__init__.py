"""Ops of domain `qwen` as standard operators of ONNX.
Used by the targets that have no fused kernel.
"""
