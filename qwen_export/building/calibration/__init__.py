"""A text chooses the codes of quantized matrices.
`calibrate_model.py` goes through the model, layer by layer, with activations in files.
"""
