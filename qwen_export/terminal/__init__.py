"""What `qwen-export chat` is made of: the conversation, its commands, where questions come from, how answers are shown.
Imports prompt_toolkit and rich when a terminal is there.
"""
