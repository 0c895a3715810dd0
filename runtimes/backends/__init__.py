"""What executes a compiled graph, what it needs of a machine, and whether a bundle is whole.
`open_graphs.py` is the table of backends.
"""
