"""GGUF files as llama.cpp writes them, read as a checkpoint.
Header, configuration, text, and weights with the converter's folds undone.
"""
