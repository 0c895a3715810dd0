"""How a weight can be stored: one file per quantization method, listed in `format_table.py`.
Each one turns stored tensors into logical ones.
"""
