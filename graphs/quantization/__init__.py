"""Which matrices are quantized, to which format, and how codes and scales are found and packed.
Numpy only.
"""
