"""From a checkpoint to a bundle: plan, lowering, emission, staging.
`compiler.py` has the stages in order.
"""
