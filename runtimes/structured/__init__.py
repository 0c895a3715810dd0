"""What a request may require of an answer: its form, tool calls, a limit of reasoning, log probabilities, where it ends.
`llguidance` is loaded by the first answer that needs a grammar, and by nothing else.
"""
