"""Ops of domain qwen and what each target makes of them."""
