"""Passes that hold for every target, the context that passes get, and the check of invariants after each pass.
Passes of one target are in `plugins`.
"""
