"""Lazy weights: how each tensor of a graph is made from tensors of the checkpoint."""
