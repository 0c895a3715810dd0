"""LoRA adapters in PEFT's form, merged into the weights of a checkpoint while they are read.
A merged weight is a logical tensor: builds, plans and the eager reference see the same one.
"""
