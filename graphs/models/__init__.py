"""The family as plain `torch.nn` modules, with the parameter names of the checkpoint.
These are traced, and they are the reference of `verify`.
"""
