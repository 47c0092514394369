"""SFT: what an example becomes, that only responses are learnt, and which data is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from slingshot.base.errors import SlingshotError
from slingshot.base.files import write_jsonl
from slingshot.checkpoint.load_save import load_model, load_tokenizer
from slingshot.cost.receipt import Receipt
from slingshot.stages import sft

EXAMPLES = [
    {"prompt": f"What is {a}+{b}?", "reasoning": f"{a} plus {b} is {a + b}", "answer": str(a + b)}
    for a in range(1, 9)
    for b in range(1, 6)
]


@pytest.fixture
def finetuning(base, tmp_path):
    """finetuning(**changes): on 40 examples of a file."""
    write_jsonl(tmp_path / "data" / "data.jsonl", EXAMPLES)
    paths = {"model": str(base), "data": [str(tmp_path / "data")]}
    common = {**paths, "dtype": "float32", "threads": 1, "sequence_length": 48, "batch_size": 4}
    return lambda **changes: sft.SFTConfig.parse({**common, **changes}, "sft")


def marked(config, tokenizer):
    return sft.encode(sft.read(config), tokenizer, config)


def pairs(config, tokenizer):
    """Ids of prompt and response."""
    parts = [(ids, len(ids) - sum(mask)) for ids, mask in marked(config, tokenizer)]
    return [(ids[:start], ids[start:]) for ids, start in parts]


def test_an_example_is_its_prompt_in_the_template_and_the_response(base, finetuning):
    tokenizer = load_tokenizer(base)
    examples = pairs(finetuning(), tokenizer)
    assert len(examples) == 40
    prompt, response = examples[0]
    assert prompt == tokenizer.encode_chat([{"role": "user", "content": "What is 1+1?"}])
    assert tokenizer.decode(response) == "1 plus 1 is 2\n</think>\n\n2" and response[-1] == tokenizer.eos_id


def test_only_responses_are_targets_and_every_epoch_has_all_of_them(base, finetuning):
    config, tokenizer = finetuning(), load_tokenizer(base)
    examples = pairs(config, tokenizer)
    packed = [sft.rows_of_epoch(marked(config, tokenizer), config, epoch) for epoch in range(2)]
    seen = []
    for rows in packed:
        found = []
        for tokens_T, segments_T, weights_T in zip(rows.tokens_BT, rows.segments_BT, rows.weights_BT, strict=True):
            for segment in range(1, int(segments_T.max()) + 1):
                inside, learnt = segments_T == segment, weights_T > 0
                found.append((tokens_T[inside & ~learnt].tolist(), tokens_T[inside & learnt].tolist()))
            assert weights_T[segments_T == 0].count_nonzero() == 0
        assert sorted(found) == sorted(examples)
        seen.append(found)
    assert seen[0] != seen[1]


def test_the_models_own_generation_config_is_passed_on(base, finetuning, tmp_path):
    shutil.copytree(base, tmp_path / "own")
    own = {"eos_token_id": [1, 4], "temperature": 0.3, "bos_token_id": 0, "pad_token_id": 2}
    (tmp_path / "own" / "generation_config.json").write_text(json.dumps(own))
    sft.run(finetuning(model=str(tmp_path / "own")), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == own
    assert load_tokenizer(tmp_path / "out").eos_ids == {1, 4}


def test_a_run_learns_the_format_and_says_what_it_took(base, finetuning, metrics, tmp_path):
    sft.run(finetuning(epochs=3, optimizer={"lr": 0.01, "adam_lr": 0.01}), tmp_path / "out")
    rows, receipt = metrics(tmp_path / "out"), Receipt.read(tmp_path / "out")
    per_epoch = -(-len(sft.rows_of_epoch(marked(finetuning(), load_tokenizer(base)), finetuning(), 0).tokens_BT) // 4)
    assert abs(len(rows) - 3 * per_epoch) <= 3 and [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"] and rows[-1]["mtp_loss"] < 0.9 * rows[0]["mtp_loss"]
    assert {parent.path for parent in receipt.parents} == {str(base), str(tmp_path / "data")}
    assert receipt.extra["examples"] == 40
    length = sum(len(prompt) + len(response) for prompt, response in pairs(finetuning(), load_tokenizer(base)))
    assert receipt.tokens == 3 * length
    assert load_model(tmp_path / "out").config == load_model(base).config


@pytest.mark.slow
def test_products_may_be_in_fp8_but_not_beside_adapters(finetuning, metrics, tmp_path):
    for name, choice in (("plain", {}), ("low", {"fp8": "tensor"})):
        sft.run(finetuning(epochs=1, **choice), tmp_path / name)
    first, low = (metrics(tmp_path / name)[0]["loss"] for name in ("plain", "low"))
    assert 0 < abs(low - first) < 0.05 * first
    with pytest.raises(SlingshotError, match="sft: fp8: with lora the matrices that it is for are frozen; leave one"):
        finetuning(fp8="block", lora={})


def test_tasks_write_worked_solutions_of_the_train_split(base, finetuning, sums):
    tokenizer = load_tokenizer(base)
    config = finetuning(data=[], tasks=[sums], examples=20)
    responses = [tokenizer.decode(response) for _, response in pairs(config, tokenizer)]
    assert len(responses) == 20 and all(" plus " in response and "</think>" in response for response in responses)
    config = finetuning(data=[], tasks=[sums], examples=20, style="answer")
    assert not [response for _, response in pairs(config, tokenizer) if "plus" in tokenizer.decode(response)]


def test_a_model_without_a_template_is_put_the_question_as_text(base, finetuning):
    tokenizer = load_tokenizer(base)
    prompt, response = pairs(finetuning(form={"chat": False, "text": "Q: {prompt} A:"}), tokenizer)[0]
    assert prompt == [tokenizer.bos_id, *tokenizer.encode("Q: What is 1+1? A:")]
    assert response[0] == tokenizer.think_id  # the prompt does not open the reasoning, so the response does


@pytest.mark.parametrize("lengths", [{"sequence_length": 48}, {"sequence_length": 500}])
def test_examples_that_are_too_long_are_counted_and_refused_when_they_are_most(finetuning, tmp_path, capsys, lengths):
    """Longer than a row, or than the model's max_position_embeddings of 128."""
    long = EXAMPLES[0] | {"reasoning": "1 plus 1 is 2, " * 60}
    write_jsonl(tmp_path / "long.jsonl", [long, EXAMPLES[1], EXAMPLES[2]])
    config = finetuning(data=[str(tmp_path / "long.jsonl")], epochs=1, **lengths)
    sft.run(config, tmp_path / "out")
    longest = min(128, config.sequence_length)
    assert f"out: 1 of 3 examples are longer than {longest} tokens and left out\n" in capsys.readouterr().err
    extra = Receipt.read(tmp_path / "out").extra
    assert (extra["examples"], extra["dropped"]) == (2, 1)
    write_jsonl(tmp_path / "long.jsonl", [long, long, EXAMPLES[1]])
    line = rf"2 of 3 examples are longer than {longest} tokens, .* has \d+; raise seq"
    with pytest.raises(SlingshotError, match=line):
        sft.run(config, tmp_path / "other")


def test_rows_without_reasoning_and_chats_are_taken(base, finetuning, tmp_path):
    """An empty think block or none; each assistant message of a chat is an example, to all before it."""
    tokenizer = load_tokenizer(base)
    ask, say = {"role": "user", "content": "What is 1+1?"}, {"role": "assistant", "content": "2"}
    write_jsonl(tmp_path / "silent.jsonl", [
        {"prompt": "What is 1+1?", "answer": 2},
        {"messages": [ask, say | {"content": [{"type": "text", "text": "2"}]}]},
        {"messages": [ask, say, ask, say | {"reasoning_content": "so"}]},
    ])  # fmt: skip
    opened = tokenizer.encode_chat([ask])
    found = pairs(finetuning(data=[str(tmp_path / "silent.jsonl")]), tokenizer)
    assert [prompt for prompt, _ in found] == [opened] * 3 + [tokenizer.encode_chat([ask, say, ask])]
    empty = "\n</think>\n\n2"
    assert [tokenizer.decode(response) for _, response in found] == [empty] * 3 + ["so" + empty]
    without = pairs(finetuning(data=[str(tmp_path / "silent.jsonl")], no_reasoning="none"), tokenizer)
    assert [tokenizer.decode(response) for _, response in without] == ["2"] * 3 + ["so" + empty]
    assert all(response[-1] == tokenizer.eos_id for _, response in without)
    before = opened[: opened.index(tokenizer.think_id)]
    assert [prompt for prompt, _ in without] == [before] * 3 + [tokenizer.encode_chat([ask, say, ask])]


@pytest.mark.parametrize(("lines", "message"), [
    ('{"prompt": "a", "reasoning": "b"}\n', 'data.jsonl line 1: an example holds "prompt" and "answer", with or'),
    ('{"prompt": "a", "answer": "c"}\n\n{"prompt": "a", "answer": true}\n', "line 3: an example holds"),
    ('{"prompt": NaN, "answer": "c"}\n', "line 1: an example holds"),
    ("[1, 2]\n", "line 1: an example holds"),
    ('{"messages": [{"role": "wizard", "content": "a"}, {"role": "assistant", "content": "b"}]}\n', "example .*wizard"),
    ('{"messages": [{"role": "user", "content": "a"}]}\n', "line 1: an example holds"),
    ('{"messages": "a"}\n', "line 1: an example holds"),
    (json.dumps({"messages": [{"role": r, "content": "2"} for r in ("user", "assistant")], "ids": [3]}), "line 1: an"),
    ("nonsense\n", "data.jsonl line 1 is not valid JSON"),
    ("", "no examples; did any sample pass the verifier"),
])  # fmt: skip
def test_data_that_holds_no_examples_is_named(finetuning, tmp_path, lines, message):
    (tmp_path / "data" / "data.jsonl").write_text(lines)
    with pytest.raises(SlingshotError, match=message):
        sft.run(finetuning(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sources_that_are_not_there_are_named(finetuning, tmp_path):
    line = r"sft: no examples: give data = \[\.\.\.\], or tasks = \[\.\.\.\] with examples = N"
    with pytest.raises(SlingshotError, match=line):
        finetuning(data=[])
    with pytest.raises(SlingshotError, match="nowhere does not exist"):
        sft.run(finetuning(data=["nowhere"]), tmp_path / "out")
    with pytest.raises(SlingshotError, match="gym:leg_counting writes no worked solutions; give data"):
        sft.run(finetuning(data=[], tasks=[{"name": "gym:leg_counting"}], examples=2), tmp_path / "out2")


@pytest.mark.slow
def test_adapters_alone_are_trained_and_written_merged_and_beside(base, finetuning, metrics, tmp_path):
    lora = {"rank": 4, "targets": ["attention", "mlp", "experts"]}
    sft.run(finetuning(epochs=3, lora=lora, optimizer={"lr": 0.01}), tmp_path / "out")
    rows, before, after = metrics(tmp_path / "out"), load_model(base).state_dict(), load_model(tmp_path / "out")
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    changed = {name for name, each in after.state_dict().items() if not torch.equal(each, before[name])}
    inside = (".self_attn.", ".mlp.")
    assert changed and all(any(part in name for part in inside) and "norm" not in name for name in changed)
    told = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(base) and told["r"] == 4
    stored = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.o_proj"
    a, b = (stored[f"base_model.model.{name}.lora_{each}.weight"] for each in "AB")
    torch.testing.assert_close(after.state_dict()[f"{name}.weight"], before[f"{name}.weight"] + 8 * b @ a)
