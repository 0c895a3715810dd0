"""Comparing a bundle with the checkpoint: logits, and layer by layer.
Needs the extra `export`.
"""
