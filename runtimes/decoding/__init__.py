"""Decoders: slots that hold sequences, and calls of the compiled graphs that read tokens into them.
`decoder.py` has what both kinds share.
"""
