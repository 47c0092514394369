import httpx
import openai
import pytest

PROMPT = "What is 3+4-2? 3 plus"


def test_a_text_is_gone_on_with_as_it_stands_streamed_or_not(client, engine, tokenizer):
    whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, seed=1)
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=12, seed=1, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage and whole.usage.prompt_tokens == len(tokenizer.encode_raw(PROMPT))


def test_tags_are_text_and_stop_strings_act_everywhere(says):
    client = says("3 plus 4 is 7.\n</think>\n\n5 is 7")
    text = client.completions.create(model="tiny", prompt="a", max_tokens=60).choices[0].text
    assert text == "3 plus 4 is 7.\n</think>\n\n5 is 7"
    assert client.completions.create(model="tiny", prompt="a", stop="4 is").choices[0].text == "3 plus "


def test_every_prompt_of_a_list_gets_its_answers_in_order(client, tokenizer):
    prompts = [PROMPT, "The end. Stop", "3足す4は"]
    together = client.completions.create(model="tiny", prompt=prompts, n=2, max_tokens=6, seed=5)
    assert [choice.index for choice in together.choices] == list(range(6))
    for place, prompt in enumerate(prompts):
        ids = tokenizer.encode_raw(prompt)
        alone = client.completions.create(model="tiny", prompt=ids, n=2, max_tokens=6, seed=5)
        assert [its.text for its in alone.choices] == [its.text for its in together.choices[2 * place :][:2]]


@pytest.mark.parametrize("most", [0, 1])
def test_echo_tells_the_logprobs_of_the_prompt(client, engine, tokenizer, most):
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": most, "echo": True, "logprobs": 2, "seed": 1}
    choice = client.completions.create(**asked).choices[0]
    ids, told = tokenizer.encode_raw(PROMPT), choice.logprobs
    assert choice.text.startswith(PROMPT) and (choice.text == PROMPT) == (not most)
    assert len(told.tokens) == len(told.text_offset) == len(ids) + most
    assert told.token_logprobs[0] is None and all(logprob < 0 for logprob in told.token_logprobs[1:])
    assert all(len(top) >= 1 for top in told.top_logprobs[1:])
    assert choice.text[told.text_offset[-1] :] == told.tokens[-1]


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"suffix": "7"}, "hole"),
        ({"max_tokens": 0}, "echo"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [10**6]}, "vocabulary"),
    ],
)
def test_what_cannot_be_is_refused(client, wrong, said):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "tiny", "prompt": PROMPT} | wrong)
    assert said in caught.value.body["message"]


def test_a_text_is_tokenized_and_put_together_again(served, tokenizer):
    with httpx.Client(base_url=served) as http:
        told = http.post("/tokenize", json={"model": "tiny", "prompt": PROMPT, "return_token_strs": True}).json()
        assert told["tokens"] == tokenizer.encode_raw(PROMPT) and told["max_model_len"] == 256
        assert told["count"] == len(told["token_strs"])
        assert http.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": PROMPT}
        chat = [{"role": "user", "content": PROMPT}]
        assert http.post("/tokenize", json={"messages": chat}).json()["tokens"] == tokenizer.encode_chat(chat)
        assert http.post("/tokenize", json={"messages": chat, "prompt": "both"}).status_code == 400
        info = http.get("/tokenizer_info").json()
        assert (info["eos_token"], info["chat_template"]) == (tokenizer.token("eos_token"), tokenizer.chat_template)
