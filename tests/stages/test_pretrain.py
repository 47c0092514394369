"""Pre-training: what the corpus is made of, what a run leaves behind, and what it refuses."""

import json
import math
import signal
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest
import torch

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.load_save import load_model, load_tokenizer
from slingshot.cost.flops import forward_flops
from slingshot.cost.receipt import Receipt
from slingshot.data.corpora import read_corpus, split_documents
from slingshot.stages import pretrain, tokenize
from slingshot.stages.tokenize import TokenizeConfig
from slingshot.tasks.loader import load_task
from tests.waiting import PATIENCE

FEW = {"tasks": [{"name": "arithmetic"}], "count": 5}


def test_a_run_leaves_a_checkpoint_its_metrics_and_its_account(base, pretraining, metrics):
    rows, receipt, config = metrics(base), Receipt.read(base), pretraining()
    corpus = pretrain.prepare(config)
    assert [row["step"] for row in rows] == list(range(1, 31))
    model, tokenizer = load_model(base), load_tokenizer(base)
    assert model.config.vocab_size == tokenizer.vocab_size <= 300 and model.config.eos_token_id == tokenizer.eos_id
    assert rows[0]["loss"] == pytest.approx(math.log(tokenizer.vocab_size), rel=0.02)
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"] and rows[-1]["mtp_loss"] < 0.8 * rows[0]["mtp_loss"]
    assert set(rows[0]) == {"step", "loss", "mtp_loss", "balance_loss", "expert_load", "lr", "gradient_norm"}
    assert len(rows[0]["expert_load"]) == 2
    assert receipt.tokens == sum(corpus.batch(step, config.batch_size).n_tokens for step in range(30)) > 29 * 16 * 48
    assert receipt.stage == "pretrain" and receipt.parents == []
    assert receipt.flops == receipt.flops_by_part["training"] + receipt.flops_by_part["mtp"]
    # every batch is full: the FLOPs lie between those of one-token documents and of rows that are one document
    extremes = [1] * receipt.tokens, [48] * (30 * 16)
    low, high = (3 * forward_flops(model.config, lengths) for lengths in extremes)
    assert low < receipt.flops_by_part["training"] < high
    assert config.model_dump(mode="json") == receipt.config


@pytest.mark.slow
def test_the_same_seed_makes_the_same_weights(base, pretraining, metrics, tmp_path):
    pretrain.run(pretraining(), tmp_path / "again")
    assert metrics(tmp_path / "again") == metrics(base)
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (base / file).read_bytes()


@pytest.mark.slow
def test_products_in_fp8_are_a_choice_of_training_alone(base, pretraining, metrics, tmp_path):
    """It learns as without, from the same weights; the receipt tells of it, and the checkpoint is float32's."""
    pretrain.run(pretraining(fp8="block"), tmp_path / "out")
    rows, plain = metrics(tmp_path / "out"), metrics(base)
    assert 0 < abs(rows[0]["loss"] - plain[0]["loss"]) < 0.01 * plain[0]["loss"]
    assert rows[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=0.1)
    assert Receipt.read(tmp_path / "out").config["fp8"] == "block"
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert load_model(tmp_path / "out").lm_head.weight.dtype == torch.float32


def test_the_corpus_follows_its_seed(pretraining):
    first, again, other = (pretrain.prepare(pretraining(seed=seed)) for seed in (0, 0, 1))
    assert np.array_equal(first.tokens_NT, again.tokens_NT) and np.array_equal(first.segments_NT, again.segments_NT)
    assert not np.array_equal(first.tokens_NT, other.tokens_NT)


def test_documents_are_of_the_train_split_in_their_shares(pretraining, sums):
    documents = {"tasks": [sums], "count": 400, "styles": {"answer": 0.75, "steps": 0.25}, "template_share": 0.3}
    written = list(pretrain._written(pretraining(documents=documents)))
    assert len(written) == 400
    in_template = [document for document in written if len(document) == 3]
    assert 0.2 < len(in_template) / 400 < 0.4
    with_steps = [document for document in written if "plus" in "".join(document[1:]) or " plus " in document[0]]
    assert len(with_steps) == 100
    task = load_task(sums["name"], **sums["params"])
    tested = {problem.prompt for problem in islice(task.problems("test", 0), 500)}
    assert tested and not tested & {document[0].splitlines()[0] for document in written}


def test_plain_documents_are_framed_and_chats_follow_the_template(pretraining):
    tokenizer = pretrain.prepare(pretraining()).tokenizer
    plain, chat = pretrain._encode(tokenizer, [("3+4=7",), ("What is 3+4?", "3 plus 4 is 7", "7")])
    assert plain == [tokenizer.bos_id, *tokenizer.encode("3+4=7"), tokenizer.eos_id]
    prompt = tokenizer.encode_chat([{"role": "user", "content": "What is 3+4?"}])
    assert chat[: len(prompt)] == prompt and chat[-1] == tokenizer.eos_id
    assert tokenizer.decode(chat[len(prompt) :]) == "3 plus 4 is 7\n</think>\n\n7"


def test_every_epoch_takes_every_row_once_in_an_order_of_its_own(pretraining):
    """Ten rows in batches of 5."""
    config = pretraining(batch_size=5)
    tokenizer = pretrain.prepare(config).tokenizer
    rows = pretrain.PackedCorpus(tokenizer, np.arange(10)[:, None].repeat(8, axis=1), np.ones((10, 8), dtype=np.int32))
    batches = [tuple(rows.batch(step, config.batch_size).tokens_BT[:, 0].tolist()) for step in range(6)]
    epochs = [sorted(batches[i] + batches[i + 1]) for i in (0, 2, 4)]
    assert epochs == [list(range(10))] * 3 and len(set(batches)) > 3


def test_router_biases_move_until_the_frozen_share(pretraining, tmp_path, monkeypatch):
    """Eight steps of which the last quarter is frozen: six moves, each of the speed or none."""
    real, moved = pretrain.update_router_biases, []

    def counted(model, load_LE, speed):
        moved.append(speed)
        real(model, load_LE, speed)

    monkeypatch.setattr(pretrain, "update_router_biases", counted)
    pretrain.run(pretraining(steps=8, bias_update_speed=0.01, bias_frozen_share=0.25), tmp_path / "out")
    layers = load_model(tmp_path / "out").moe_layers()
    moves = torch.cat([layer.gate.e_score_correction_bias for layer in layers]) / 0.01
    assert moved == [0.01] * 6
    assert torch.allclose(moves, moves.round(), atol=1e-4) and 0.999 < moves.abs().max() < 6.001


@pytest.mark.slow
def test_real_text_is_scored_in_bits_per_byte_of_held_out_documents(pretraining, tmp_path):
    """The figure in the receipt is the documents' negative log likelihood, each token once, over their bytes.

    Documents are longer than the model sees at once: from the second window on, half a window at least.
    """
    text = tmp_path / "corpus.jsonl"
    line = "Line {}: the sum of {} and {} is {}. それは{}です。"
    texts = [" ".join(line.format(i, i, k, i + k, i) for k in range(i % 7)) + "end" for i in range(100)]
    text.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    pretrain.run(pretraining(documents=None, text=[str(text)], text_key="body", steps=5), tmp_path / "out")
    model, tokenizer = load_model(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    train, heldout = split_documents(read_corpus([str(text)], "body"))
    assert len(heldout) > 3 and len(train) + len(heldout) == 100
    nats, longest = 0.0, 0
    for document in heldout:
        ids = [tokenizer.bos_id, *tokenizer.encode(document), tokenizer.eos_id]
        longest = max(longest, len(ids))
        for place in range(1, len(ids)):  # each token by itself
            window = 0 if place < 48 else 24 * ((place - 24) // 24)
            with torch.no_grad():
                logits = model(torch.tensor([ids[window : place + 1]])).logits_BTV[0, -2]
            nats -= float(logits.log_softmax(-1)[ids[place]])
    expected = nats / math.log(2) / sum(len(document.encode()) for document in heldout)
    assert longest > 3 * 48
    assert Receipt.read(tmp_path / "out").extra["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_a_task_without_solutions_is_named(pretraining, tmp_path):
    task = tmp_path / "capitals.py"
    task.write_text(
        "def problems(split, seed):\n    yield {'prompt': 'Japan?', 'answer': 'Tokyo'}\n\n"
        "def verify(problem, text):\n    return float(text == problem['answer'])\n"
    )
    with pytest.raises(SlingshotError, match=rf"^documents: the task {task} writes no worked solutions; give text"):
        pretrain.run(pretraining(documents={"tasks": [{"name": str(task)}], "count": 5}), tmp_path / "out")


@pytest.mark.slow
def test_ctrl_c_while_the_corpus_is_prepared_stops_at_once(pretraining, tmp_path):
    """Another process, so that the signal comes at any moment; nothing is left but what the next attempt takes up."""
    config = pretraining(documents={"tasks": [{"name": "arithmetic"}], "count": 10_000_000})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-m", "slingshot", "stage", "pretrain", "--config", str(tmp_path / "config.json")]
    stage = subprocess.Popen([*command, "--out", str(tmp_path / "out")], start_new_session=True)
    while not (tmp_path / "out.partial" / "identity.json").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    stage.send_signal(signal.SIGINT)
    assert stage.wait(timeout=PATIENCE) == 130
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out.partial"]


def test_a_tokenizer_of_another_checkpoint_is_taken_over(base, pretraining, tmp_path):
    pretrain.run(pretraining(tokenizer=str(base), steps=1, seed=3), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert [parent.path for parent in Receipt.read(tmp_path / "out").parents] == [str(base)]


def test_a_diverging_run_stops_with_its_last_good_state(pretraining, tmp_path):
    config = pretraining(optimizer={"lr": 1e30, "adam_lr": 1e30, "warmup": 0.0}, save_seconds=0.0)
    line = r"^out: (loss|gradient_norm) is (nan|inf) at step \d; the state of step \d is kept in .*out\.partial"
    with pytest.raises(SlingshotError, match=line):
        pretrain.run(config, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    (state,) = (tmp_path / "out.partial").glob("state-*")
    assert int(state.name.removeprefix("state-")) >= 1


def test_a_task_writes_in_styles_of_its_own_where_it_has_some(pretraining):
    tasks = [{"name": "arithmetic", "styles": {"steps": 1.0}}, {"name": "multiplication", "weight": 3}]
    documents = pretraining(documents={"tasks": tasks, "count": 80, "styles": {"answer": 3.0, "slips": 1.0}}).documents
    assert [documents.counts(task) for task in documents.tasks] == [{"steps": 20}, {"answer": 45, "slips": 15}]


@pytest.mark.parametrize(("changes", "message"), [
    ({"documents": None}, r"base: a corpus is needed: give \[documents\], text = \[...\], or both, or shards"),
    ({"model": {"family": "deepseek_v3"}}, "^base.model.hidden_size: Field required$"),
    ({"model": {}}, "base: give model = {...} for a new one, or start = CHECKPOINT to go on from one, and not both"),
    ({"start": "x"}, "base: give model = {...} for a new one, or start = CHECKPOINT to go on from one, and not both"),
    ({"model": {}, "start": "x", "tokenizer": "y"}, "base: start brings its tokenizer; leave `tokenizer` out"),
    ({"yarn": {"factor": 4}}, "base: yarn makes the context of a checkpoint longer; name it: start = CHECKPOINT"),
    ({"model": {}, "start": "x", "yarn": {"factor": 1}}, "base.yarn.factor: Input should be greater than 1, got 1"),
    ({"steps": 0}, "base.steps: Input should be greater than or equal to 1, got 0"),
    ({"vocab_size": 100}, "base.vocab_size: .* got 100"),
    ({"leraning_rate": 1.0}, "base.leraning_rate: unknown key"),
    ({"optimizer": {"betas": (0.9, 1.5)}}, "base.optimizer.betas"),
    ({"sequence_length": 256}, "base: sequence_length 256 is beyond the model's max_position_embeddings 128"),
    ({"documents": FEW | {"tasks": []}}, "base.documents.tasks"),
    ({"documents": FEW | {"count": 0}}, "base.documents.count"),
    ({"documents": FEW | {"styles": {}}}, "base.documents.styles"),
    ({"documents": FEW | {"styles": {"steps": -1.0}}}, "base.documents.styles"),
    ({"documents": FEW | {"template_share": 1.5}}, "base.documents.template_share"),
    ({"documents": FEW | {"styles": {"calls": 1.0}}}, "arithmetic has no tools to call in style calls; give it tools"),
])  # fmt: skip
def test_a_config_that_cannot_run_is_refused_before_it_does(pretraining, changes, message):
    with pytest.raises(SlingshotError, match=message) as refused:
        pretraining(**changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("changes", "message"), [
    ({"text": ["nowhere.txt"]}, "nowhere.txt does not exist"),
    ({"batch_size": 2000}, r"fills \d+ rows of 48 tokens, fewer than one batch of 2000; add text or lower batch_size"),
    ({"tokenizer": "nowhere"}, "nowhere: no such folder"),
    ({"documents": FEW | {"tasks": [{"name": "arithmetics"}]}}, "'arithmetics' is unknown; did you mean arithmetic"),
])  # fmt: skip
def test_a_corpus_that_cannot_be_is_named(pretraining, tmp_path, changes, message):
    with pytest.raises(SlingshotError, match=message):
        pretrain.run(pretraining(**changes), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_trained_on_in_the_context_that_yarn_gives_it(base, pretraining, metrics, tmp_path):
    """Rows of the checkpoint's length have nearly the loss it ended with, far from a new model's; longer ones are
    refused without yarn, and with it a model comes of them that is extended once and for all."""
    on = {"model": {}, "start": str(base), "steps": 2, "optimizer": {"lr": 1e-4, "adam_lr": 1e-4}}
    pretrain.run(pretraining(**on), tmp_path / "on")
    assert metrics(tmp_path / "on")[0]["loss"] < 1.1 * metrics(base)[-1]["loss"] < 0.4 * metrics(base)[0]["loss"]
    assert (tmp_path / "on" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert [parent.path for parent in Receipt.read(tmp_path / "on").parents] == [str(base)]

    with pytest.raises(SlingshotError, match=f"^{base}: sequence_length 256 is beyond .*_embeddings 128; give yarn = "):
        pretrain.run(pretraining(**on, sequence_length=256), tmp_path / "long")
    yarn = {"factor": 8, "original_max_position_embeddings": 48}
    longer = on | {"yarn": yarn, "sequence_length": 256, "batch_size": 2, "micro_batch_size": 1}
    pretrain.run(pretraining(**longer), tmp_path / "long")
    assert metrics(tmp_path / "long")[-1]["loss"] < metrics(base)[0]["loss"] / 2
    config, original = load_model(tmp_path / "long").config, load_model(base).config
    assert config.max_position_embeddings == 384 and (rope := config.rope_scaling) is not None
    assert (rope.rope_type, rope.factor, rope.original_max_position_embeddings) == ("yarn", 8.0, 48)
    assert (rope.beta_fast, rope.beta_slow, rope.mscale, rope.mscale_all_dim) == (32.0, 1.0, 1.0, 1.0)
    assert config.to_hf() | {"rope_scaling": None, "max_position_embeddings": 128} == original.to_hf()
    with pytest.raises(SlingshotError, match=r"long has rope_scaling yarn, factor 8, already; leave yarn out"):
        pretrain.run(pretraining(**longer | {"start": str(tmp_path / "long")}), tmp_path / "again")


def test_shards_of_another_tokenizer_do_not_train_a_checkpoint_on(base, pretraining, tmp_path):
    (tmp_path / "text.txt").write_text("Another text, another tokenizer. " * 200)
    tokenize.run(TokenizeConfig.parse({"text": [str(tmp_path / "text.txt")], "vocab_size": 270}, "t"), tmp_path / "t")
    given = pretraining(model={}, documents=None, start=str(base), shards=[str(tmp_path / "t")], batch_size=1)
    with pytest.raises(SlingshotError, match=f"another tokenizer than {base}'s; tokenize the text with tokenizer = "):
        pretrain.run(given, tmp_path / "out")
