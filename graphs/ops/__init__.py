"""The ops of domain `qwen`: equation, shapes and an eager body that PyTorch runs.
Modules call them, lowerings in `plugins` replace them.
"""
