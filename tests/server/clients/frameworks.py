"""Python frameworks against a server: chat, streams, a forced call of a tool, an answer in a form.

python frameworks.py http://127.0.0.1:8000 MODEL [langchain agents pydantic_ai instructor llama_index litellm qwen_agent]
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any, Literal

URL, MODEL = sys.argv[1].rstrip("/").removesuffix("/v1") + "/v1", sys.argv[2]
os.environ |= {
    "OPENAI_API_KEY": "none",
    "OPENAI_BASE_URL": URL,
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}
OFF = {"enable_thinking": False}
QUESTION = "What is the capital of Norway?"


def langchain() -> None:
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel

    class Place(BaseModel):
        name: Literal["Oslo", "Bergen"]

    def multiply(a: int, b: int) -> int:
        """Multiply two numbers."""
        return a * b

    model = ChatOpenAI(model=MODEL, base_url=URL, max_tokens=300, extra_body=OFF)
    assert model.invoke(QUESTION).content and [part.content for part in model.stream(QUESTION)]
    [call, *_] = model.bind_tools([multiply], tool_choice="required").invoke("What is 6 times 7?").tool_calls
    assert call["name"] == "multiply" and {type(value) for value in call["args"].values()} == {int}
    assert isinstance(model.with_structured_output(Place, method="json_schema").invoke(QUESTION), Place)
    assert isinstance(model.with_structured_output(Place, method="function_calling").invoke(QUESTION), Place)
    assert ChatOpenAI(model=MODEL, base_url=URL, max_tokens=64, use_responses_api=True).invoke(QUESTION).content


def agents() -> None:
    from agents import Agent, ModelBehaviorError, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool
    from openai import AsyncOpenAI

    called = []

    @function_tool
    def multiply(a: int, b: int) -> int:
        called.append((a, b))
        return a * b

    remote = AsyncOpenAI(base_url=URL)
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        settings = ModelSettings(tool_choice="required", max_tokens=300)
        agent = Agent(
            name="a", instructions="Be short.", model=kind(model=MODEL, openai_client=remote), tools=[multiply], model_settings=settings
        )
        before = len(called)
        with contextlib.suppress(ModelBehaviorError):  # an untrained model may not come to an end behind the call
            Runner.run_sync(agent, "What is 6 times 7?")
        assert len(called) > before


def pydantic_ai() -> None:
    from pydantic import BaseModel
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Place(BaseModel):
        name: Literal["Oslo", "Bergen"]

    agent = Agent(OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key="none")), output_type=Place)
    assert isinstance(asyncio.run(agent.run(QUESTION)).output, Place)


def instructor() -> None:
    import instructor as library
    from openai import OpenAI
    from pydantic import BaseModel

    class Place(BaseModel):
        name: Literal["Oslo", "Bergen"]

    for mode in (library.Mode.TOOLS, library.Mode.JSON_SCHEMA):
        made = library.from_openai(OpenAI(base_url=URL), mode=mode).chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": QUESTION}], response_model=Place, max_tokens=600, max_retries=1
        )
        assert isinstance(made, Place)


def llama_index() -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    question = [ChatMessage(role="user", content=QUESTION)]
    model = OpenAILike(model=MODEL, api_base=URL, api_key="none", is_chat_model=True, context_window=8192, max_tokens=64)
    assert model.chat(question).message.content is not None and list(model.stream_chat(question))
    plain = OpenAILike(model=MODEL, api_base=URL, api_key="none", is_chat_model=False, max_tokens=8)
    assert plain.complete("one two").text


def litellm() -> None:
    import litellm as library

    given: dict[str, Any] = {"api_base": URL, "api_key": "none", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 64}
    for kind in ("openai", "hosted_vllm"):
        made = library.completion(model=f"{kind}/{MODEL}", **given)
        assert made.choices[0].message.reasoning_content or made.choices[0].message.content
        assert list(library.completion(model=f"{kind}/{MODEL}", stream=True, **given))


def qwen_agent() -> None:
    from qwen_agent.llm import get_chat_model

    made = {"max_tokens": 64, "use_raw_api": True, "extra_body": {"enable_thinking": True}}
    model = get_chat_model({"model": MODEL, "model_server": URL, "api_key": "none", "generate_cfg": made})
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    question = [{"role": "user", "content": QUESTION}]
    assert list(model.chat(messages=question, stream=True))
    functions = [{"name": "double", "description": "Doubles.", "parameters": parameters}]
    assert list(model.chat(messages=question, functions=functions, stream=True))


def main() -> int:
    known: dict[str, Callable[[], None]] = {
        run.__name__: run for run in (langchain, agents, pydantic_ai, instructor, llama_index, litellm, qwen_agent)
    }
    failed = 0
    for name in sys.argv[3:] or known:
        try:
            known[name]()
            print(f"ok    {name}", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAIL  {name}: {type(error).__name__}: {str(error)[:400]}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
