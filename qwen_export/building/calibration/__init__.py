"""Reading a text to choose the codes of quantized matrices."""
