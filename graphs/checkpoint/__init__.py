"""Reading a checkpoint directory: headers, names, shapes and rows of weights.
Nothing here imports torch or onnx.
"""
