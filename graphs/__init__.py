"""From a checkpoint to a target's graph."""
