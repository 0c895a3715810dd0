"""Text around tokens: chat template, tokenizer, detokenizer, reasoning and stop strings.
No file here knows a decoder.
"""
