"""The stage tokenize and pre-training on what it writes."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json
from slingshot.checkpoint.load_save import load_tokenizer
from slingshot.cost.receipt import Receipt
from slingshot.data.corpora import read_corpus
from slingshot.data.packing import pack
from slingshot.data.shards import TokenShards
from slingshot.recipe.recipe import Recipe
from slingshot.recipe.runner import run
from slingshot.stages import pretrain, tokenize
from slingshot.stages.kinds import STAGES
from slingshot.training.identity import Identity
from slingshot.training.parallel import Parallel
from slingshot.training.shard_corpus import ShardCorpus

SMALL = {"vocab_size": 300, "heldout": 0.2, "shard_tokens": 2000, "threads": 1}


def tokenizing(text, **changes):
    return tokenize.TokenizeConfig.parse({"text": [str(text)], **SMALL, **changes}, "corpus")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    rows = ({"text": " ".join(f"{i} and {k} make {i + k}." for k in range(i % 9 + 1))} for i in range(200))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def shards(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "corpus"
    tokenize.run(tokenizing(text), out)
    return out


def test_shards_hold_the_corpus_in_its_order_and_what_is_held_out_apart(text, shards):
    found, tokenizer, receipt = TokenShards.open(shards), load_tokenizer(shards), Receipt.read(shards)
    found.verify()
    texts, config = list(read_corpus([text])), tokenizing(text)
    train = [each for each in texts if not config.holds_out(each)]
    heldout = [each for each in texts if config.holds_out(each)]
    assert 20 < len(heldout) < 60 and len(found.index.tokens) > 2
    ids = [[tokenizer.bos_id, *tokenizer.encode(each), tokenizer.eos_id] for each in train]
    tokens_NT, segments_NT = found.read(range(found.rows(32)), 32)
    assert tokens_NT[segments_NT > 0].tolist() == [id for document in ids for id in document]
    assert [tokenizer.decode(each) for each in found.heldout()] == heldout
    assert found.index.heldout_bytes == sum(len(each.encode()) for each in heldout) == receipt.extra["heldout_bytes"]
    assert receipt.tokens == receipt.extra["train_tokens"] + receipt.extra["heldout_tokens"]
    assert receipt.extra["train_tokens"] == found.tokens == sum(map(len, ids))
    assert all(2000 <= shard.tokens < 2400 for shard in found.index.tokens[:-1])


def test_rows_of_one_shard_are_those_of_packing_the_text(text, tmp_path):
    config = tokenizing(text, shard_tokens=10**6)
    tokenize.run(config, tmp_path / "corpus")
    found, tokenizer = TokenShards.open(tmp_path / "corpus"), load_tokenizer(tmp_path / "corpus")
    train = [each for each in read_corpus([text]) if not config.holds_out(each)]
    expected = pack([[tokenizer.bos_id, *tokenizer.encode(each), tokenizer.eos_id] for each in train], 48)
    rows = found.read(range(found.rows(48)), 48)
    assert (rows[0] == expected[0]).all() and (rows[1] == expected[1]).all()


@pytest.mark.slow
def test_pre_training_reads_shards_and_scores_what_they_hold_out(shards, pretraining, metrics, tmp_path):
    config = pretraining(documents=None, shards=[str(shards)], steps=12)
    pretrain.run(config, tmp_path / "out")
    rows, receipt = metrics(tmp_path / "out"), Receipt.read(tmp_path / "out")
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"] and 0 < receipt.extra["bits_per_byte"] < 8
    assert [parent.path for parent in receipt.parents] == [str(shards)]
    assert receipt.parents[0].digest == Receipt.read(shards).digest
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (shards / "tokenizer.json").read_bytes()
    found = TokenShards.open(shards)
    assert receipt.extra["corpus_tokens"] == found.tokens
    assert receipt.extra["epochs"] == receipt.extra["epochs_of"][str(shards)] == 12 * 16 / found.rows(48)


def test_documents_are_a_share_of_the_rows_beside_shards(shards, pretraining, sums, tmp_path):
    """A quarter: their rows are those that are packed of what the task writes, in the shards' tokenizer."""
    documents = {"tasks": [sums], "count": 60, "styles": {"answer": 1.0}, "template_share": 0.0, "weight": 1}
    config = pretraining(documents=documents, shards=[{"path": str(shards), "weight": 3}], steps=2)
    pretrain.run(config, tmp_path / "out")
    receipt, found = Receipt.read(tmp_path / "out"), TokenShards.open(shards)
    assert receipt.extra["epochs_of"][str(shards)] == pytest.approx(0.75 * 2 * 16 / found.rows(48))
    rows, tokenizer = pretrain._open_shards(config).batch(0, 16), load_tokenizer(shards)
    texts = [tokenizer.decode(row.tolist()) for row in rows.tokens_BT]
    assert sum("What is" in text and "+" in text for text in texts) == 4 and len(texts) == 16
    assert receipt.extra["corpus_tokens"] > found.tokens


def test_any_number_of_ranks_takes_the_same_global_batch(shards, text, tmp_path):
    tokenize.run(tokenizing(text, tokenizer=str(shards), seed=1), tmp_path / "other")
    corpus = ShardCorpus.open({shards: 3.0, tmp_path / "other": 1.0}, 32, seed=5)
    for step in (0, 7, 100_000):
        batch = corpus.batch(step, 8)
        assert len(batch) == 8
        for size in (1, 2, 4):
            ranks = [corpus.batch(step, 8).shard(Parallel(rank, size)) for rank in range(size)]
            tokens = torch.stack([rows.tokens_BT for rows in ranks], dim=1).flatten(0, 1)
            assert torch.equal(tokens, batch.tokens_BT)


def test_a_run_is_another_where_its_shards_hold_something_else(shards, pretraining, text, tmp_path):
    config = pretraining(documents=None, shards=[{"path": str(shards), "weight": 2}])
    identity = Identity.of("pretrain", config)
    assert identity.digests == {str(shards): Receipt.read(shards).digest}
    tokenize.run(tokenizing(text, heldout=0.4), tmp_path / shards.name)
    other = pretraining(documents=None, shards=[{"path": str(tmp_path / shards.name), "weight": 2}])
    changes = Identity.of("pretrain", other).differences(identity, pretrain.PretrainConfig)
    assert changes == [f"{shards.name} changed"]


def test_shards_that_were_touched_are_compared_and_the_changed_one_is_named(shards, text, tmp_path):
    tokenize.run(tokenizing(text), tmp_path / "corpus")
    file = tmp_path / "corpus" / "tokens-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-2] + b"\1\1")
    with pytest.raises(SlingshotError, match=r"corpus/tokens-00001\.safetensors was changed after it was written"):
        ShardCorpus.open({tmp_path / "corpus": 1.0}, 32, seed=0)
    tokenize.run(tokenizing(text, vocab_size=310), tmp_path / "other")
    with pytest.raises(SlingshotError, match=r"other was written by another tokenizer than .*corpus's; tokenize"):
        ShardCorpus.open({shards: 1.0, tmp_path / "other": 1.0}, 32, seed=0)


@pytest.mark.parametrize(("changes", "message"), [
    ({"text": ["stdlib"]}, "base: shards bring a tokenizer, and text beside them goes into shards of its own"),
    ({"tokenizer": "x"}, "base: shards bring a tokenizer, and text beside them goes into shards of its own"),
    ({"shards": ["a", {"path": "a", "weight": 2}]}, "base: shards: one folder is named twice"),
    ({"shards": [{"path": "a", "weight": 0}]}, "base.shards.0.weight: Input should be greater than 0"),
])  # fmt: skip
def test_shards_beside_what_does_not_go_with_them_are_refused(pretraining, changes, message):
    with pytest.raises(SlingshotError, match=message):
        pretraining(documents=None, **{"shards": ["a"], **changes})


def test_a_corpus_that_leaves_nothing_to_train_on_is_refused(tmp_path):
    (tmp_path / "one.txt").write_text("the only document")
    with pytest.raises(SlingshotError, match="there is no text to train a tokenizer on"):
        tokenize.run(tokenizing(tmp_path / "one.txt", heldout=0.9999999), tmp_path / "out")


def test_a_recipe_trains_on_the_shards_of_an_earlier_stage(tmp_path):
    table = '[corpus]\nstage = "tokenize"\ntext = ["stdlib"]\n[base]\nstage = "pretrain"\nmodel = "deepseek-v3"\n'
    (tmp_path / "two.toml").write_text(table + 'shards = [{ path = "@corpus", weight = 0.5 }, "runs/other"]\n')
    recipe = Recipe.load(str(tmp_path / "two.toml"))
    assert [(stage.name, stage.parents) for stage in recipe.stages] == [("corpus", []), ("base", ["corpus"])]
    with pytest.raises(SlingshotError, match="base: runs/other does not exist"):
        run(recipe, tmp_path / "out")


@pytest.mark.slow
def test_a_killed_stage_goes_on_and_ends_with_the_same_bytes(tmp_path):
    """Killed twice, wherever it is; states are saved after every batch."""
    text = tmp_path / "long.txt"
    text.write_text("".join(f"{number} times {number} is {number**2}\n" for number in range(240_000)))
    config = tokenizing(text, save_seconds=0.0, shard_tokens=300_000)
    tokenize.run(config, tmp_path / "whole")
    (tmp_path / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-m", "slingshot", "stage", "tokenize", "--config", str(tmp_path / "config.json")]
    partial, seen = tmp_path / "out.partial", set()
    for _ in range(2):
        stage = subprocess.Popen([*command, "--out", str(tmp_path / "out")])
        while stage.poll() is None and not {path.name for path in partial.glob("state-*")} - seen:
            time.sleep(0.01)
        stage.send_signal(signal.SIGKILL)
        assert stage.wait() == -signal.SIGKILL
        seen |= {path.name for path in partial.glob("state-*")}
    subprocess.run([*command, "--out", str(tmp_path / "out")], check=True)
    assert seen and not partial.exists()
    for file in (tmp_path / "whole").glob("[!rm]*"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    assert read_json(tmp_path / "out" / "index.json")["documents"] > 500
    assert STAGES["tokenize"].makes_checkpoint is False


@pytest.mark.slow
def test_two_processes_write_and_train_as_one_does(text, pretraining, metrics, tmp_path):
    configs = {
        "tokenize": tokenizing(text),
        "pretrain": pretraining(documents=None, shards=[str(tmp_path / "1")], steps=3),
    }
    for kind, config in configs.items():
        (tmp_path / f"{kind}.json").write_text(config.model_dump_json())
    tokenize.run(configs["tokenize"], tmp_path / "1")
    pretrain.run(configs["pretrain"], tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for kind, out in (("tokenize", "2"), ("pretrain", "two")):
        given = ["--config", str(tmp_path / f"{kind}.json"), "--out", str(tmp_path / out)]
        subprocess.run([*torchrun, "-m", "slingshot", "stage", kind, *given], check=True, capture_output=True)
    for file in (tmp_path / "1").glob("*.safetensors"):
        assert (tmp_path / "2" / file.name).read_bytes() == file.read_bytes()
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    scores = [Receipt.read(tmp_path / name).extra["bits_per_byte"] for name in ("one", "two")]
    assert scores[1] == pytest.approx(scores[0], abs=1e-5)
