"""The doctor's report: true of this machine, and with advice where something faster is missing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from families import small_model
from reward_makers import classifier, llama3_tokenizer, save, save_gated
from tokenizer_makers import CHATML, make_tokenizer
from typer.testing import CliRunner

from fastcompat.benchmark.doctor import examine
from fastcompat.cli.application import app
from fastcompat.errors import UsageError
from fastcompat.ops import backends


def found() -> dict[str, str]:
    return {finding.subject: finding.found for finding in examine()}


@pytest.fixture
def without_extension(monkeypatch):
    backends.why_not.cache_clear()
    monkeypatch.setattr(backends, "_load_native", lambda: "the C++ extension was not built")
    yield
    backends.why_not.cache_clear()


def test_it_says_what_this_machine_has():
    report = found()
    assert report["torch"] == torch.__version__
    assert (report["GPU"] == "none") == (not torch.cuda.is_available())
    if backends.native_levels():
        assert report["C++ extension"] == ", ".join(backends.native_levels())
        assert report["linear_nll on CPU"] == report["packed_nll on CPU"] == f"C++, {backends.native_levels()[0]}"
    assert f"{torch.get_num_threads()} of " in report["processor"]
    level = backends.native_levels()[:1]
    assert report["attention on CPU"] == (f"C++, {level[0]}" if level else "torch")
    assert ("linear_nll on GPU" in report) == torch.cuda.is_available()


def test_what_is_missing_comes_with_the_reason_and_the_fix(without_extension):
    served = next(finding for finding in examine() if finding.subject == "linear_nll on CPU")
    assert served.found == "torch, slower"
    assert served.why == "the C++ extension was not built"
    assert "C++17 compiler" in str(served.advice)
    output = CliRunner().invoke(app, ["doctor"]).output
    assert output.count("C++17 compiler") == 1
    assert "To do" in output


@pytest.mark.parametrize(("driver", "advice"), [(None, None), ("/usr/bin/nvidia-smi", "install a CUDA build of torch")])
def test_a_gpu_that_this_torch_cannot_use(monkeypatch, driver, advice):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("fastcompat.benchmark.doctor.shutil.which", lambda name: driver)
    monkeypatch.setattr("fastcompat.benchmark.doctor.Path.exists", lambda path: False)
    gpu = next(finding for finding in examine() if finding.subject == "GPU")
    assert (gpu.found, "built for CPUs only" in str(gpu.why)) == ("none", True)
    assert (gpu.advice is None) if advice is None else (advice in str(gpu.advice))


def test_a_bound_on_threads_is_shown(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr("fastcompat.benchmark.doctor.os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    processor = next(finding for finding in examine() if finding.subject == "processor")
    assert "1 of 16" in processor.found
    assert "unset OMP_NUM_THREADS" in str(processor.advice)


def test_the_command_writes_a_table_and_json():
    table = CliRunner().invoke(app, ["doctor"])
    assert table.exit_code == 0, table.output
    for text in ("Machine", "Kernels", "Versions", "linear_nll on CPU", torch.__version__):
        assert text in table.output
    as_json = CliRunner().invoke(app, ["doctor", "--format", "json"])
    assert as_json.exit_code == 0, as_json.output
    rows = json.loads(as_json.output)
    assert {row["section"] for row in rows} == {"machine", "kernels", "versions"}
    assert any(row["subject"] == "Python" and row["found"] == sys.version.split()[0] for row in rows)


def test_it_waits_for_torch_alone():
    code = "import sys; from fastcompat.benchmark import doctor; doctor.examine(); print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_it_says_which_modules_of_a_model_are_fused(tmp_path):
    model = small_model("StarCoder2")
    model.save_pretrained(tmp_path)
    report = {finding.subject: finding for finding in examine(str(tmp_path)) if finding.section == "base model"}
    assert report["attention"].found == "3 of 3 fused"
    assert report["layer"].found == "0 of 3 fused"
    assert report["layer"].why == "Starcoder2DecoderLayer: its norms are kept as they are"
    assert report["token budget"].found.endswith(" tokens a pack")
    output = CliRunner().invoke(app, ["doctor", "--base-model", str(tmp_path)]).output
    assert "3 of 3 fused" in output


def of_reward_model(path, **choices):
    return {f.subject: f for f in examine(None, str(path), **choices) if f.section == "reward model"}


def test_it_says_what_a_reward_model_reads_and_where(tmp_path, monkeypatch):
    monkeypatch.setattr("fastcompat.scoring.memory_choice.free_memory", lambda device: 1 << 40)
    path = save(tmp_path, classifier("Llama", pad_token_id=2), llama3_tokenizer())
    report = of_reward_model(path)
    assert report["architecture"].found == "LlamaForSequenceClassification, float32"
    assert (report["head"].found, report["head"].why) == ("sequence classification, output LABEL_0", None)
    assert report["read at"].found == "the rightmost token that is not 2"
    assert report["read at"].why == "token 2 pads"
    assert report["template"].found == "the tokenizer's own chat template"
    assert report["BOS"].found == "one"
    assert report["longest conversation"].found == "512 tokens"
    assert report["layer"].found == "3 of 3 fused"
    assert report["token budget"].found == "4,096 tokens a pack"
    output = CliRunner().invoke(app, ["doctor", "--reward-model", path]).output
    assert "sequence classification, output LABEL_0" in output


def test_of_several_outputs_one_is_chosen(tmp_path):
    path = save(tmp_path, classifier("Qwen2", n_labels=3, pad_token_id=None), make_tokenizer(chat_template=CHATML))
    runner = CliRunner()
    refused = runner.invoke(app, ["doctor", "--reward-model", path]).exception
    assert isinstance(refused, UsageError)
    assert "0 LABEL_0, 1 LABEL_1, 2 LABEL_2" in str(refused)
    report = of_reward_model(path, reward_output="1")
    assert report["head"].found == "sequence classification, output LABEL_1"
    assert report["head"].why == "one of LABEL_0, LABEL_1, LABEL_2"
    assert (report["read at"].found, report["read at"].why) == ("the last token", "config.json names no pad token")
    assert report["BOS"].found == "none"
    chosen = runner.invoke(app, ["doctor", "--reward-model", path, "--reward-output", "LABEL_2", "--format", "json"])
    assert {"sequence classification, output LABEL_2"} <= {row["found"] for row in json.loads(chosen.output)}
    idle = runner.invoke(app, ["doctor", "--reward-output", "1"]).exception
    assert isinstance(idle, UsageError)
    assert "name one with --reward-model" in str(idle)


def test_it_says_where_a_gate_reads(tmp_path):
    report = of_reward_model(save_gated(tmp_path, "ArmoRM"))
    assert report["head"].found == "ArmoRM, output score"
    assert report["read at"].found.startswith("the token before the first ")
    assert report["read at"].why.startswith("the gate where the last prompt ends")
