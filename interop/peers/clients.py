"""LangChain and OpenAI's Agents SDK as clients: {"url", "does", "model", "question"} in, what came out."""

import json
import sys

from agents import Agent, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(True)  # it would tell OpenAI


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"rain in {city}"


class Capital(BaseModel):
    """A city."""

    city: str


def main(url: str, does: str, model: str, question: str) -> dict:
    if does == "agent":
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        agent = Agent("agent", model=OpenAIResponsesModel(model, client), tools=[function_tool(weather.func)])
        return {"text": Runner.run_sync(agent, question).final_output}
    chat = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, temperature=0, max_retries=0)
    if does == "invoke":
        answer = chat.invoke(question)
        return {"text": answer.content, "usage": answer.usage_metadata}
    if does == "stream":
        chunks = list(chat.stream(question, stream_usage=True))
        usage = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
        return {"text": "".join(chunk.content for chunk in chunks), "chunks": len(chunks), "usage": usage[-1]}
    if does == "structured":
        return {"city": chat.with_structured_output(Capital, method="json_schema").invoke(question).city}
    offered = chat.bind_tools([weather])
    called = offered.invoke(question)
    results = [weather.invoke(call) for call in called.tool_calls]
    history = [("user", question), called, *results]
    return {"calls": called.tool_calls, "text": offered.invoke(history).content}


print(json.dumps(main(**json.load(sys.stdin))))
