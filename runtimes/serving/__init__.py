"""Many sequences at once: an engine whose one thread runs steps over all of them.
Steps are planned in `scheduler.py`; what is kept of earlier prompts is in `prefix_cache.py`.
"""
