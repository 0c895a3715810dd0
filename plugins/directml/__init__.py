"""The target `directml`: the operators that DirectML has, and a pass that refuses others.
The graphs are those of `plugins/standard`.
"""
