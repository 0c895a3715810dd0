"""Many sequences at once: what takes part in each step, the thread that runs the steps, and what is kept of earlier prompts."""
