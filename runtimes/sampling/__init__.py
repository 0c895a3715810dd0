"""From logits to the next token: penalties, filters, distributions, defaults of a checkpoint.
Numpy only.
"""
