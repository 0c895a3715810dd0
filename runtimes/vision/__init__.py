"""Pictures and videos on their way into the model: decoding, sizes, patches, positions, and the tower's results.
Everything but decoding is numpy; Pillow and PyAV are loaded when a file has to be decoded.
"""
