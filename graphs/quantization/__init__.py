"""Quantised weights: what is quantised how (plan), with what error (methods), in which layout (packing)."""
