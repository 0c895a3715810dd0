"""Graph rewrites, one per file; qwen_export.targets lists which target runs which, in order."""
