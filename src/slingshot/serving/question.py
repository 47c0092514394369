"""What a client asks, in one form, whichever API it speaks.

    question = Question("tiny", messages=[{"role": "user", "content": "3+4"}], params=SamplingParams(max_tokens=64))

Messages and tools are as OpenAI's chat API has them, which is how chat templates read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slingshot.engine.sampling import SamplingParams
from slingshot.serving.errors import ApiError

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Question:
    """One request.

    messages      a chat, or
    prompt        text that is continued as it stands, or token ids; suffix: what stands behind the hole it fills
    params        how to sample; n samples; max_tokens is ignored where `most` is None
    most          tokens of each answer at most, None: as many as the context has room for
    thinking      whether the answer begins with reasoning, None: as the template does. Where the template cannot leave
                  it out, it is closed at once
    effort        how much reasoning, in the client's word, which the template may read; where it does not, "low" bounds
                  it to a share of the answer
    tools         JSON schemas of functions; those of `strict` are called with arguments that keep to their schema
    tool_choice   "auto", "none" or "required"; function: the one that is to be called, where a certain one is
    parallel      whether an answer may hold several calls
    continues     the last message is an assistant's that the answer goes on with
    seeded        whether the client chose params.seed, so that the same question gets the same answer
    glass         tell of each token the experts that made it, and whether it was drafted
    logprobs      whether those of the answer's tokens are read
    user          whose cache it shares, where the owner keeps users apart
    """

    model: str
    messages: Sequence[Message] | None = None
    prompt: str | Sequence[int] | None = None
    suffix: str | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    most: int | None = None
    thinking: bool | None = None
    effort: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    strict: frozenset[str] = frozenset()
    tool_choice: str = "auto"
    function: str | None = None
    parallel: bool = True
    continues: bool = False
    seeded: bool = False
    glass: bool = False
    logprobs: bool = False
    user: str = ""


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates read them: text for content, "system" for OpenAI's "developer", reasoning by one name.

    ApiError 400 for what is none, or holds what this server's models do not read.
    """
    plain = []
    for place, message in enumerate(messages):
        where = f"messages.{place}"
        role = role_of(message, ROLES, where)
        own = {key: value for key, value in message.items() if value is not None and key != "prefix"}
        if "content" in own:
            own["content"] = text_of(own["content"], f"{where}.content")
        if reasoning := own.pop("reasoning", None) or own.get("reasoning_content"):
            own["reasoning_content"] = text_of(reasoning, f"{where}.reasoning_content")
        plain.append(own | {"role": "system" if role == "developer" else role})
    return plain


def role_of(message: Message, known: Sequence[str], where: str) -> str:
    """A message's role; ApiError 400 for none of those known."""
    role = message.get("role")
    if role not in known:
        raise ApiError(400, f"{where}: role {role!r:.80} is none of {', '.join(known)}", param=f"{where}.role")
    return str(role)


def joined(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same chat so that every template tells all of it, and in its order: agents send several messages of the
    system's, also late ones.

    Some templates keep one of them alone, others move all to the head, before what the cache has. So those at the head
    are one message, and a later one is the user's. The user's that follow one another are one message, too.
    """
    told: list[dict[str, Any]] = []
    for message in messages:
        late = message["role"] == "system" and told and told[-1]["role"] != "system"
        its = message | {"role": "user"} if late else message
        same = bool(told) and its["role"] == told[-1]["role"] and its["role"] in ("system", "user")
        if same and "content" in its and "content" in told[-1]:
            told[-1] = its | {"content": f"{told[-1]['content']}\n\n{its['content']}"}
        else:
            told.append(its)
    return told


def reasoning_apart(message: dict[str, Any]) -> dict[str, Any]:
    """An earlier answer whose reasoning a client put before it, in one text: closed, or cut before it was."""
    content = message.get("content")
    if message["role"] != "assistant" or not isinstance(content, str) or not content.startswith("<think>"):
        return message
    reasoning, _, answer = content.removeprefix("<think>").partition("</think>")
    return {"reasoning_content": reasoning.strip("\n")} | message | {"content": answer.lstrip("\n")}


def text_of(content: Any, where: str) -> str:
    """Text, or the texts of a list of parts, a paragraph each."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{where}: content is text, or a list of parts", param=where)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else part
        if kind not in ("text", "input_text", "output_text", "refusal", None) or not isinstance(text, str):
            what = f"of type {kind!r:.80}" if isinstance(kind, str) else "without a type"
            raise ApiError(400, f"{where}: a part {what}; this server's models read text only", param=where)
        texts.append(text)
    return "\n".join(texts)
