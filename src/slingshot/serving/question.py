"""What a client asks, in one form, whichever API it speaks.

    question = Question("tiny", messages=[{"role": "user", "content": "3+4"}], params=SamplingParams(max_tokens=64))

Messages and tools are as OpenAI's chat API has them, which is how chat templates read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slingshot.engine.sampling import SamplingParams

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """One request.

    messages      a chat, or
    prompt        text that is continued as it stands, or token ids
    params        how to sample; n samples; max_tokens is ignored where `most` is None
    most          tokens of each answer at most, None: as many as the context has room for
    thinking      whether the answer begins with reasoning, where the template can choose; None: as the template does
    tools         JSON schemas of functions; tool_choice: "auto", "none", "required" or a function's name
    continues     the last message is an assistant's that the answer goes on with
    seeded        whether the client chose params.seed, so that the same question gets the same answer
    glass         tell of each token its alternatives, its experts and where it came from
    user          whose cache it shares, where the owner keeps users apart
    """

    model: str
    messages: Sequence[Message] | None = None
    prompt: str | Sequence[int] | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    most: int | None = None
    thinking: bool | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str = "auto"
    continues: bool = False
    seeded: bool = False
    glass: bool = False
    user: str = ""
