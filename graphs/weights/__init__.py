"""Weights as expressions over stored tensors, and the writer that evaluates them block by block into one file.
Memory does not depend on the size of the model.
"""
