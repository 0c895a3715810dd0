"""From a checkpoint to a captured graph: config, stored tensors, modules, ops and the passes that hold for every target.
Imports nothing of `plugins` and `runtimes`.
"""
