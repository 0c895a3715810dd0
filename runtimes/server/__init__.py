"""HTTP in front of an engine: the protocols of OpenAI and Anthropic from one stream of events (`answer_choices.py`).
`application.py` makes the ASGI application, `http_server.py` the process of `qwen-export serve`; nothing else imports this package.
"""
