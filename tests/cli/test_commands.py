"""The command line as a user meets it: what each mistake says, and what is kept when input is bad."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command_line import fail, invoke, succeed
from corpora import prepare_small_units, rows_of, save_small_model, write_corpus, write_jsonl
from safetensors.torch import load_file, save_file

from fastcompat.errors import CorpusError, Interrupted, ModelError, RunError, SchemaError, UsageError
from fastcompat.store.run import open_run


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model") / "small")


def test_score_rank_status_verify_on_a_users_files(tmp_path, model):
    write_corpus(tmp_path / "corpus", generators=3, n_prompts=12)
    run = tmp_path / "run"
    output = succeed("score", tmp_path / "corpus", "--base-model", model, "-o", run)
    assert "36 responses of 3 generators from 3 files" in output
    assert "prompt" in output
    assert "the tokenizer's own chat template" in output
    assert "ok 36" in output
    assert f"fastcompat rank {run}" in output
    ranking = json.loads(succeed("rank", run, "--format", "json"))
    assert sorted(row["generator"] for row in ranking) == ["generator-0", "generator-1", "generator-2"]
    assert all(row["loss_low"] <= row["loss"] <= row["loss_high"] for row in ranking)
    assert ranking == sorted(ranking, key=lambda row: row["loss"])
    for format in ("table", "md", "csv"):
        assert "generator-1" in succeed("rank", run, "--format", format)
    assert "finished · 36/36" in succeed("status", run)
    assert "whole: 36 rows" in succeed("verify", run)


def test_an_interrupted_run_can_be_looked_at_before_its_first_unit_is_finished(tmp_path, model, monkeypatch):
    write_corpus(tmp_path / "corpus", generators=3, n_prompts=12)
    run = tmp_path / "run"
    prepare_small_units(run, tmp_path / "corpus", target_unit_chars=1 << 20)
    asked = itertools.count(1)
    monkeypatch.setattr("fastcompat.cli.working.stopping", lambda: nullcontext(lambda: next(asked) >= 6))
    stopped = invoke("score", "-o", run, "--base-model", model, "--token-budget", 128)
    monkeypatch.undo()
    assert isinstance(stopped.exception, Interrupted)
    assert f"fastcompat rank {run}" in str(stopped.exception)
    assert "Give the same command again" in str(stopped.exception)
    (begun,) = run.glob("scores/*/begun-*")
    n_scored = 36 - pq.read_table(begun)["nll_sum"].null_count
    assert 6 <= n_scored < 36
    assert f"{n_scored}/36 responses" in stopped.output
    assert f"{n_scored}/36 responses, {n_scored} of them in 1 unfinished unit" in succeed("status", run)
    assert f"ok {n_scored}" in succeed("status", run)
    assert "0 parts of 1 scorers, 1 unfinished" in succeed("verify", run)
    ranked = json.loads(invoke("rank", run, "--format", "json").stdout)
    assert sum(row["n"] for row in ranked) == n_scored
    assert f"{36 - n_scored} responses not scored yet under small" in succeed("rank", run)
    assert f"{36 - n_scored} responses" in succeed("select", run, "--by", "loss", "-o", tmp_path / "best.jsonl")
    succeed("report", run, "-o", tmp_path / "report.html", "--draws", 20)
    assert f"has gone through {n_scored} of 36 responses" in re.sub(
        r"<.*?>", "", (tmp_path / "report.html").read_text()
    )
    begun.write_bytes(b"garbage")
    assert "0/36 responses" in succeed("status", run)
    assert "no scores yet" in fail(UsageError, "rank", run)
    assert isinstance(invoke("verify", run).exception, RunError)
    succeed("score", "-o", run, "--base-model", model)
    assert "finished · 36/36 responses\n" in succeed("status", run)


def test_every_kind_of_bad_row_is_kept_with_a_reason(tmp_path, model):
    lines = [
        json.dumps({"prompt": "p", "response": "the list of files"}),
        '{"prompt": "broken", "response": ',
        json.dumps({"prompt": "null", "response": None}),
        json.dumps({"prompt": "empty", "response": ""}),
        json.dumps({"prompt": "number", "response": 17}),
        '{"prompt": "surrogate", "response": "a\\ud800b"}',
        json.dumps({"prompt": "word " * 4000, "response": "after a prompt that is too long"}),
        json.dumps({"prompt": "cut", "response": "word " * 4000}),
        json.dumps({"prompt": "p", "response": "the list of files"}),
    ]
    corpus = tmp_path / "bad.jsonl"
    corpus.write_text("\n".join(lines) + "\n")
    output = succeed("score", corpus, "--base-model", model, "-o", tmp_path / "run")
    scores = open_run(tmp_path / "run").scores().to_pylist()
    assert [row["row_index"] for row in scores] == list(range(9))
    wanted = ["ok", "invalid", "empty", "empty", "invalid", "invalid", "prompt_too_long", "truncated", "ok"]
    assert [row["status"] for row in scores] == wanted
    for row in scores:
        carries = row["status"] in ("ok", "truncated")
        assert (row["loss"] is not None) == (row["nll_sum"] is not None) == carries
        assert carries or row["detail"]
    assert scores[0]["nll_sum"] == scores[8]["nll_sum"]
    assert scores[7]["n_prompt_tokens"] + scores[7]["n_tokens"] == 512
    assert "invalid 3" in output
    assert "invalid, for example" in output
    assert f"{corpus}#1" in output.replace("\n", "")
    strict = fail(CorpusError, "score", corpus, "--base-model", model, "-o", tmp_path / "strict", "--strict")
    assert "bad.jsonl" in strict


def test_damaged_files_keep_what_comes_before_the_damage(tmp_path, model):
    directory = tmp_path / "corpus"
    directory.mkdir()
    write_jsonl(directory / "a.jsonl", rows_of("a", n_prompts=5))
    whole = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows_of("b", n_prompts=4000)))
    (directory / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    pq.write_table(pa.Table.from_pylist(rows_of("c", n_prompts=5)), directory / "c.parquet")
    data = (directory / "c.parquet").read_bytes()
    (directory / "c.parquet").write_bytes(data[: len(data) // 2])
    (directory / "d.jsonl").write_text("")
    write_jsonl(directory / "e.jsonl", [{"prompt": "p", "note": "no response here"}])
    succeed("score", directory, "--base-model", model, "-o", tmp_path / "run", "--max-length", 64)
    scores = open_run(tmp_path / "run").scores().to_pylist()
    by_file: dict[str, list[str]] = {}
    for row in scores:
        by_file.setdefault(Path(row["source"]).name, []).append(row["status"])
    assert by_file["a.jsonl"] == ["ok"] * 5
    assert by_file["b.jsonl.gz"].count("unreadable") == 1
    assert by_file["b.jsonl.gz"].count("ok") > 100
    assert by_file["c.parquet"] == ["unreadable"]
    assert "d.jsonl" not in by_file
    assert by_file["e.jsonl"] == ["invalid"]


def test_unknown_columns_say_what_was_found_and_what_to_set(tmp_path, model):
    corpus = write_jsonl(tmp_path / "odd.jsonl", [{"ask": "p", "reply": "the list"}])
    message = fail(SchemaError, "score", corpus, "--base-model", model, "-o", tmp_path / "run")
    for expected in ("ask", "reply", "--map", "messages"):
        assert expected in message
    succeed(
        "score", corpus, "--base-model", model, "-o", tmp_path / "run", "--map", "prompt=ask", "--map", "response=reply"
    )
    wrong = fail(
        SchemaError, "score", corpus, "--base-model", model, "-o", tmp_path / "other", "--map", "response=rply"
    )
    assert "rply" in wrong
    assert "reply" in wrong


def test_wrong_models_get_one_sentence(tmp_path, model):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows_of("a", n_prompts=2))

    def refused(directory: Path) -> str:
        message = fail(ModelError, "score", corpus, "--base-model", directory, "-o", tmp_path / "run")
        assert "\n" not in message
        return message

    assert "no such directory" in refused(tmp_path / "nowhere")
    assert "config.json" in refused(tmp_path)
    pickled = shutil.copytree(model, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    assert "pickle" in refused(pickled)
    (pickled / "pytorch_model.bin").unlink()
    assert "safetensors" in refused(pickled)
    remote = shutil.copytree(model, tmp_path / "remote")
    config = json.loads((remote / "config.json").read_text())
    config |= {"model_type": "my_own", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}}
    (remote / "config.json").write_text(json.dumps(config))
    assert "code" in refused(remote)
    truncated = shutil.copytree(model, tmp_path / "truncated")
    data = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(data[:1000])
    assert "model.safetensors is damaged" in refused(truncated)
    wordless = shutil.copytree(model, tmp_path / "wordless")
    for path in wordless.glob("*token*"):
        path.unlink()
    assert "tokenizer" in refused(wordless)


def test_a_hub_id_that_cannot_be_reached_is_one_sentence(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows_of("a", n_prompts=2))
    message = fail(ModelError, "score", corpus, "--base-model", "nobody/nothing", "-o", tmp_path / "run")
    assert "nobody/nothing" in message
    assert "\n" not in message


def test_a_hub_model_in_the_cache_is_scored_offline_and_is_the_same_scorer_as_its_copy(tmp_path, model):
    cached = tmp_path / "hub" / "models--somebody--small"
    snapshot = cached / "snapshots" / ("c0ffee" * 7)[:40]
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(snapshot.name)
    shutil.copytree(model, snapshot)
    corpus = write_jsonl(tmp_path / "a.jsonl", rows_of("a", n_prompts=2))
    command = [sys.executable, "-m", "fastcompat", "score", str(corpus), "-o", str(tmp_path / "run"), "--base-model"]
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    for source, expected in (("somebody/small", "ok 2"), (str(model), "scored before")):
        done = subprocess.run([*command, source], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
    (scorer,) = open_run(tmp_path / "run").scorers()
    assert scorer.record["settings"]["model"] == "somebody/small"


def test_checkpoints_whose_weights_are_not_all_the_models_own_are_refused(tmp_path, model):
    """transformers fills such weights in at random, or drops layers, with a warning: figures that mean nothing."""
    corpus = write_jsonl(tmp_path / "a.jsonl", rows_of("a", n_prompts=2))

    def refused(directory: Path) -> str:
        return fail(ModelError, "score", corpus, "--base-model", directory, "-o", tmp_path / "run")

    def with_layers(name: str, n_layers: int) -> Path:
        directory = shutil.copytree(model, tmp_path / name)
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": n_layers}))
        return directory

    assert "lacks" in refused(with_layers("deeper", 5))
    assert "leaves out" in refused(with_layers("shallower", 2))
    headless = shutil.copytree(model, tmp_path / "headless")
    weights = load_file(headless / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "lm_head" not in k}, headless / "model.safetensors", {"format": "pt"}
    )
    assert "lm_head" in refused(headless)


def test_architectures_that_cannot_be_packed_are_refused_when_they_are_loaded(tmp_path, model):
    from transformers import FalconConfig, FalconForCausalLM, Mamba2Config, Mamba2ForCausalLM, MptConfig, MptForCausalLM

    corpus = write_jsonl(tmp_path / "a.jsonl", rows_of("a", n_prompts=2))
    falcon = FalconConfig(vocab_size=4096, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    mpt = MptConfig(vocab_size=4096, d_model=32, n_layers=2, n_heads=2)
    mamba = Mamba2Config(vocab_size=4096, hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16)
    for network, reason in (
        (FalconForCausalLM(falcon), "attention by itself"),
        (MptForCausalLM(mpt), "not supported"),
        (Mamba2ForCausalLM(mamba), "recurrent state"),
    ):
        directory = tmp_path / network.config.model_type
        network.save_pretrained(directory)
        for file in model.glob("*token*"):
            shutil.copy(file, directory)
        message = fail(ModelError, "score", corpus, "--base-model", directory, "-o", tmp_path / "run")
        assert reason in message
        assert "\n" not in message
    assert not (tmp_path / "run" / "scores").exists()


def test_a_model_with_a_context_shorter_than_the_probe(tmp_path):
    short = save_small_model(tmp_path / "short", family="GPT-2", n_positions=12)
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "response": "a"}])
    succeed("score", corpus, "--base-model", short, "-o", tmp_path / "run", "--template", "plain")
    assert open_run(tmp_path / "run").scores()["status"].to_pylist() == ["ok"]


def test_the_process_ends_with_the_exit_code_of_the_error_and_no_traceback(tmp_path, model):
    def exit_code(*arguments: object) -> int:
        command = [sys.executable, "-m", "fastcompat", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert "Traceback" not in done.stdout + done.stderr
        assert done.stderr or done.returncode == 0
        return done.returncode

    assert exit_code("--version") == 0
    assert exit_code("rank", tmp_path) == 5
    assert exit_code("score", tmp_path / "no.jsonl", "--base-model", model, "-o", tmp_path / "run") == 3
    assert exit_code("score", tmp_path, "--base-model", tmp_path / "no", "-o", tmp_path / "run") == 4
    assert exit_code("score", tmp_path, "--worker", "0/1", "--base-model", model, "-o", tmp_path / "run") == 2


def test_options_that_make_no_sense(tmp_path, model):
    corpus = write_jsonl(tmp_path / "a.jsonl", rows_of("a", n_prompts=2))
    run = tmp_path / "run"
    assert "--reward-model" in fail(UsageError, "score", corpus, "-o", run)
    assert "I/N" in fail(UsageError, "score", corpus, "--base-model", model, "-o", run, "--worker", "x")
    assert "1 to" in fail(UsageError, "score", corpus, "--base-model", model, "-o", run, "--worker", "3/2")
    assert "NAME=COLUMN" in fail(UsageError, "score", corpus, "--base-model", model, "-o", run, "--map", "response")
    prepared = tmp_path / "prepared"
    succeed("score", corpus, "--base-model", model, "-o", prepared)
    fail(CorpusError, "score", tmp_path / "none.jsonl", "--base-model", model, "-o", tmp_path / "new")
    assert "manifest.json" in fail(RunError, "rank", tmp_path)
    assert "need INPUTs" in fail(UsageError, "score", "--base-model", model, "-o", prepared, "--map", "response=answer")
    assert "name the files" in fail(UsageError, "score", "--base-model", model, "-o", tmp_path / "unmade")
    assert invoke("score", corpus, "--no-such-option").exit_code == 2


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path, model):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter-1.tex").write_text("words")
    corpus = write_jsonl(tmp_path / "a.jsonl", rows_of("a", n_prompts=2))
    assert "not a run" in fail(RunError, "score", corpus, "--base-model", model, "-o", tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter-1.tex"]


def test_another_model_or_template_stands_beside_what_is_finished(tmp_path, model):
    corpus = tmp_path / "corpus"
    write_corpus(corpus, generators=2, n_prompts=4)
    run = tmp_path / "run"
    other = save_small_model(tmp_path / "other", seed=5)
    succeed("score", corpus, "--base-model", model, "--base-model", other, "-o", run)
    scores = open_run(run).scores()
    assert sorted(set(scores["base_model"].to_pylist())) == ["other", "small"]
    assert scores.num_rows == 16
    succeed("score", "-o", run, "--base-model", model, "--template", "alpaca")
    assert len(open_run(run).scorers()) == 3
    assert len(set(open_run(run).scores()["base_model"].to_pylist())) == 3
    # The same content from another place is the same scorer.
    moved = shutil.copytree(model, tmp_path / "moved")
    assert "scored before" in succeed("score", "-o", run, "--base-model", moved)
    assert len(open_run(run).scorers()) == 3


def test_verify_names_what_is_damaged_and_scoring_again_mends_it(tmp_path, model):
    corpus = tmp_path / "corpus"
    write_corpus(corpus, generators=2, n_prompts=4)
    run = tmp_path / "run"
    succeed("score", corpus, "--base-model", model, "-o", run)
    whole = open_run(run).scores()
    (part,) = run.glob("scores/*/part-*")
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 0xFF
    part.write_bytes(data)
    result = invoke("verify", run)
    assert isinstance(result.exception, RunError)
    part.unlink()
    succeed("score", "-o", run, "--base-model", model)
    assert open_run(run).scores().equals(whole)
    shard = run / "corpus" / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    assert "1 of" in fail(RunError, "verify", run)


def test_names_from_a_corpus_never_become_markup_or_control_sequences(tmp_path, model):
    names = ["[/b]x", "Qwen [base]", "two\nlines", "esc\x1b[31m", "a|b"]
    rows = [{"prompt": "q", "response": "the list", "generator": name} for name in names]
    succeed("score", write_jsonl(tmp_path / "a.jsonl", rows), "--base-model", model, "-o", tmp_path / "run")
    for format in ("table", "md"):
        output = succeed("rank", tmp_path / "run", "--format", format)
        assert "[/b]x" in output
        assert "Qwen [base]" in output
        assert "two\\nlines" in output
        assert "\x1b[31m" not in output
    assert "a\\|b" in output
    ranked = json.loads(succeed("rank", tmp_path / "run", "--format", "json"))
    assert sorted(row["generator"] for row in ranked) == sorted(names)


def test_a_damaged_record_or_beginning_is_named_or_forgotten(tmp_path, model):
    corpus = tmp_path / "corpus"
    write_corpus(corpus, generators=2, n_prompts=4)
    run = tmp_path / "run"
    succeed("score", corpus, "--base-model", model, "-o", run)
    whole = open_run(run).scores()
    (part,) = run.glob("scores/*/part-*")
    begun = part.with_name(part.name.replace("part-", "begun-"))
    for content in (b"garbage", part.read_bytes()):  # not Parquet; Parquet that does not say what it is
        part.unlink()
        begun.write_bytes(content)
        succeed("score", "-o", run, "--base-model", model)
        assert not begun.exists()
        assert open_run(run).scores().equals(whole)
    (record,) = run.glob("scores/*/scorer.json")
    for damaged in ("{}", "[]", '{"identity": {}, "settings": {}, "created": ""}', "{"):
        record.write_text(damaged)
        assert "scorer.json" in fail(RunError, "status", run)
    (run / "manifest.json").write_text('{"format": 1}')
    assert "manifest.json" in fail(RunError, "status", run)


def test_rank_by_columns_that_are_groups_only(tmp_path, model):
    corpus = tmp_path / "corpus"
    write_corpus(corpus, generators=2, n_prompts=4)
    succeed("score", corpus, "--base-model", model, "-o", tmp_path / "run")
    by_source = json.loads(succeed("rank", tmp_path / "run", "--by", "source", "--format", "json"))
    assert len(by_source) == 2
    for column in ("base_model", "loss", "row_key"):
        assert "not a column of groups" in fail(UsageError, "rank", tmp_path / "run", "--by", column)
    said = fail(UsageError, "rank", tmp_path / "run", "--by", "nothing")
    assert "--by nothing: not a column of groups; there are source, generator" in said


def test_inspect_marks_the_scored_tokens(tmp_path, model):
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Why so?", "response": "Because it is."}])
    output = succeed("inspect", corpus, "--base-model", model)
    marked = output[output.index("⟦") : output.index("⟧")].replace("\n", "")
    assert "Because" in marked
    assert "<|im_end|>" in marked
    assert "Why" not in marked
    assert "no row 7" in fail(UsageError, "inspect", corpus, "--base-model", model, "--row", 7)


def test_wide_records_and_preferences_end_as_one_row_per_response(tmp_path, model):
    wide = [{"uuid": "1", "instruction": "Say it.", "gemma": {"content": "the list"}, "qwen": {"content": "a file"}}]
    table = pa.Table.from_pylist(wide)
    pq.write_table(table, tmp_path / "zoo.parquet")
    succeed("score", tmp_path / "zoo.parquet", "--base-model", model, "-o", tmp_path / "run")
    scores = open_run(tmp_path / "run").scores()
    assert scores["generator"].to_pylist() == ["gemma", "qwen"]
    assert len(set(scores["prompt_id"].to_pylist())) == 1
    assert len(set(scores["row_key"].to_pylist())) == 2


def test_inspect_shows_several_rows_and_those_that_are_asked_for(tmp_path, model):
    rows = [{"prompt": f"Why {n}?", "response": f"Because {n}."} for n in range(4)]
    corpus = write_jsonl(tmp_path / "a.jsonl", [rows[0], {"prompt": "Why 7?", "response": " "}, *rows[1:]])
    other = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "Why 8?", "response": "Because 8."}])

    def keys(*options: object) -> list[str]:
        output = succeed("inspect", corpus, other, "--base-model", model, *options)
        return [line.split("#")[1].strip() for line in output.splitlines() if line.startswith("row ")]

    assert keys() == ["0"]
    assert keys("--rows", 3) == ["0", "1", "2"]
    assert keys("--row", 4, "--row", 0) == ["4", "0"]
    assert keys("--status", "empty") == ["1"]
    assert keys("--status", "ok", "--rows", 9) == ["0", "2", "3", "4", "0"]
    assert keys("--generator", "b", "--rows", 2) == ["0"]
    assert "there are a, b" in fail(UsageError, "inspect", corpus, other, "--base-model", model, "--generator", "c")
    told = fail(UsageError, "inspect", corpus, "--base-model", model, "--status", "template")
    assert "no response of status template; there are ok 4, empty 1" in told
    assert "is not one of ok, " in fail(UsageError, "inspect", corpus, "--base-model", model, "--status", "fine")
    assert "leave out" in fail(UsageError, "inspect", corpus, "--base-model", model, "--row", 1, "--status", "ok")
    assert "one model" in fail(UsageError, "inspect", corpus)
    assert "one model" in fail(UsageError, "inspect", corpus, "--base-model", model, "--reward-model", model)


def test_inspect_of_a_reward_model(tmp_path):
    from fastcompat.demo import reward_model_directory

    corpus = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Why so?", "response": "Because it is."}])
    output = succeed("inspect", corpus, "--reward-model", reward_model_directory(), "--ids")
    assert ", read at " in output
    assert output.count("⟦") == 1
    assert output.count(" yes ") == 1


def test_what_turns_hold_beside_texts_is_scored_ranked_and_selected(tmp_path, model):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Graz", "unit": None}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    chatml = tmp_path / "chatml.jinja"
    chatml.write_text(
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ m.reasoning_content or '' }}{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + c.function.arguments | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    asks = {"role": "user", "content": "How warm is it?"}
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [call], "name": "Ann"},
        {"role": "assistant", "content": "Seven.", "reasoning_content": "I guess."},
        {"role": "assistant", "content": "Eight."},
    ]
    records = [
        {"messages": [asks, turn], "tools": tools, "model": f"m{n}", "reward": n + 1.0} for n, turn in enumerate(turns)
    ]
    corpus, run = write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "run"
    output = succeed("score", corpus, "--base-model", model, "--template", chatml, "-o", run)
    assert "tools from column `tools`" in output
    assert "ok 3" in output
    (kept, dropped) = (open_run(run).scores(), None)
    own = kept.filter(kept["base_model"].is_valid())
    succeed("score", corpus, "--base-model", model, "--template", chatml, "--reasoning", "drop", "-o", run)
    again = open_run(run).scores()
    dropped = again.filter([name is not None and "drop" in name for name in again["base_model"].to_pylist()])
    assert own["n_tokens"].to_pylist()[0] == dropped["n_tokens"].to_pylist()[0]
    assert own["n_tokens"].to_pylist()[1] > dropped["n_tokens"].to_pylist()[1]

    best = tmp_path / "best.jsonl"
    label = next(name for name in again["base_model"].to_pylist() if name and "keep" in name)
    select = ("select", run, "--by", "loss", "--top", 3, "--base-model", label)
    succeed(*select, "-o", best)
    written = {row["generator"]: row for row in map(json.loads, best.read_text().splitlines())}
    for record in records:
        assert written[record["model"]]["messages"] == record["messages"]
        assert written[record["model"]]["tools"] == tools
    told = fail(UsageError, *select, "-o", tmp_path / "best.parquet")
    assert "turns call tools" in told
    assert ".jsonl" in told
    succeed(
        "select",
        run,
        "--by",
        "loss",
        "--top",
        1,
        "--base-model",
        label,
        "--max-tokens",
        12,
        "-o",
        tmp_path / "one.parquet",
    )
    (row,) = pq.read_table(tmp_path / "one.parquet").to_pylist()
    assert json.loads(row["tools"]) == tools
