"""The forms in which checkpoints store weights, one file each; `table` lists them."""
