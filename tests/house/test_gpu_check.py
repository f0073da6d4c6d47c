"""The check of a GPU: what fails, hangs or is killed costs itself only; what is printed fits; steps run on a CPU."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import gpu_check
import gpu_steps
import pytest
from gpu_check import CALLS, STEPS
from gpu_interpreter import mend
from gpu_predictions import PREDICTIONS, predicted
from gpu_steps import FINDINGS, PATIENCE, Step, allowance, run_side_by_side
from gpu_summary import shares, summary

ROOT = Path(__file__).parents[2]
GPU = ROOT / "bench" / "gpu"
# What a tool that runs the check on another machine hands back of its output, in characters.
SEEN = 12_000
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")

FAKE_STEPS = """
import json, os, signal, subprocess, sys, time
from gpu_steps import FINDINGS

def well(device):
    yield {"case": "one", "figures": {"call": {"ms": 1.5}}}
    yield {"case": "two", "value": float("nan"), "nested": [float("inf")]}

def raises(device):
    yield {"case": "before"}
    raise ValueError("no such luck")

def dies(device):
    yield {"case": "before"}
    os.kill(os.getpid(), signal.SIGKILL)

def hangs(device):
    child = subprocess.Popen(["sleep", "300"])
    yield {"case": "before", "pids": [os.getpid(), child.pid]}
    time.sleep(300)

def garbage(device):
    yield {"case": "before"}
    sys.stdout.buffer.write(bytes(range(256)) * 100)
    with open(os.environ[FINDINGS], "ab") as findings:
        findings.write(b"\\xff\\xfe{[\\n12\\n")
    yield {"case": "after"}
    with open(os.environ[FINDINGS], "ab") as findings:
        findings.write(b'{"case": "cut sho')

def leaves(device):
    child = subprocess.Popen(["sleep", "300"])
    yield {"pids": [child.pid]}
"""


@pytest.fixture
def fakes(tmp_path) -> dict[str, str]:
    """The environment in which `fake_steps:NAME` are targets."""
    (tmp_path / "fake_steps.py").write_text(FAKE_STEPS)
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(GPU)])}


def fake(*names: str, seconds: float = 30.0) -> dict[str, Step]:
    return {name: Step(target=f"fake_steps:{name}", seconds=seconds) for name in names}


def is_alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.05)


@LINUX
def test_side_by_side_each_step_costs_itself_only(tmp_path, fakes):
    kept: dict[str, dict] = {}
    names = ("well", "raises", "dies", "hangs", "garbage", "leaves")
    began = time.monotonic()
    run_side_by_side(fake(*names), seconds=6, device="none", folder=tmp_path, environment=fakes, keep=kept.update)
    assert time.monotonic() - began < 20
    assert {name: entry["status"] for name, entry in kept.items()} == {
        "well": "ok",
        "raises": "failed with exit code 1",
        "dies": "killed by 9",
        "hangs": "stopped after 6 s",
        "garbage": "ok",
        "leaves": "ok",
    }
    assert kept["well"]["findings"] == [
        {"case": "one", "figures": {"call": {"ms": 1.5}}},
        {"case": "two", "value": "nan", "nested": ["inf"]},
    ]
    for name in ("raises", "dies", "hangs"):
        assert kept[name]["findings"][0]["case"] == "before"
    assert "ValueError: no such luck" in kept["raises"]["output"]
    assert [finding["case"] for finding in kept["garbage"]["findings"]] == ["before", "after"]
    assert kept["garbage"]["unreadable_lines"] == 2
    pids = [pid for name in ("hangs", "leaves") for finding in kept[name]["findings"] for pid in finding["pids"]]
    assert len(pids) == 3
    assert not [pid for pid in pids if is_alive(pid)]
    assert json.loads(json.dumps(kept, allow_nan=False)) == kept


@pytest.mark.parametrize("remaining", [1.0, 30.0, 100.0, 250.0])
@pytest.mark.parametrize("plan", [[10.0], [10, 110, 60, 30, 8], [50, 1], [1, 50]])
def test_time_is_shared_out(plan, remaining):
    total = remaining
    given = []
    for n, planned in enumerate(plan):
        given.append(allowance(planned, sum(plan[n + 1 :]), remaining))
        remaining -= given[-1]  # each takes all that it may
    assert remaining > -1e-9
    for planned, seconds in zip(plan, given, strict=True):
        assert min(planned, 0.999 * planned * total / sum(plan)) <= seconds <= PATIENCE * planned
    # Whoever needs less leaves the rest to the others.
    assert allowance(10, 20, 100) == 20
    assert allowance(10, 20, 25) == pytest.approx(25 / 3)


@pytest.mark.parametrize("name", CALLS)
def test_a_calls_plan_fits_its_seconds(name):
    call = CALLS[name]
    planned = sum(max(STEPS[step].seconds for step in group) for group in call.groups)
    assert planned <= call.seconds - gpu_check.AT_THE_END
    assert len({step for group in call.groups for step in group}) == sum(map(len, call.groups))


def test_every_step_is_in_a_call_and_is_a_function():
    assert {step for call in CALLS.values() for group in call.groups for step in group} == set(STEPS)
    for step in STEPS.values():
        module, _, function = step.target.partition(":")
        tree = ast.parse((GPU / f"{module}.py").read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, step.target


def test_predictions_are_of_steps_and_say_how_a_figure_stands():
    for prediction in PREDICTIONS:
        assert any(re.match(prediction.step, name) for name in STEPS), prediction
        assert prediction.low <= prediction.high
    found = predicted("linear_nll", "linear_nll 8192 x 4096 -> 128256, bf16 (Llama-3.1-8B)", "linear_nll", "TFLOP/s")
    assert found is not None
    assert str(found) == "500 to 560"
    assert [found.verdict(value) for value in (499, 500, 561)] == ["<", "=", ">"]
    assert predicted("linear_nll", " 4096 ->", "linear_nll", "ms") is None


CHECK = """
import signal, sys
from pathlib import Path
import gpu_check, gpu_steps
from gpu_steps import Step

gpu_steps.INTERIM = 0.1
gpu_check.BUILD["none"] = Path(sys.argv[1])
gpu_check.CARRIED = gpu_check.ROOT / "there-is-none"
gpu_check.assemble = lambda build: None
gpu_check._gpu_name = lambda: "fake"
gpu_check.environment_of = lambda device: {}
gpu_check.STEPS.update({name: Step(target=f"fake_steps:{name}", seconds=30) for name in ("well", "hangs")})
gpu_check.CALLS["fake"] = gpu_check.Call(seconds=100, groups=(("well",), ("hangs",), ("well",)))
signal.signal(signal.SIGTERM, gpu_check._interrupted)
gpu_check.run_call("fake", None, "none", Path(sys.argv[1]), None)
"""


@LINUX
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_check_has_found_is_there(tmp_path, fakes, number):
    path = tmp_path / "gpu_check-fake-fake.json"
    process = subprocess.Popen(
        [sys.executable, "-c", CHECK, str(tmp_path)], env=os.environ | fakes, stdout=subprocess.PIPE, text=True
    )

    def steps() -> dict:
        # Whole whenever it is read.
        return json.loads(path.read_text())["steps"] if path.exists() else {}

    try:
        wait_until(lambda: steps().get("hangs", {}).get("findings"))
        process.send_signal(number)
        output, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    found = steps()
    assert (found["well"]["status"], len(found["well"]["findings"])) == ("ok", 2)
    own, child = found["hangs"]["findings"][0]["pids"]
    wait_until(lambda: not is_alive(own))
    if number == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert found["hangs"]["status"] == "stopped with the check"
        assert "! hangs: stopped with the check" in output.splitlines()[-SEEN:]
        assert not is_alive(child)
    else:
        assert found["hangs"]["status"] == "under way"
        if is_alive(child):
            os.kill(child, signal.SIGKILL)


def result_of(n: int) -> dict:
    wrong = {"case": "a wrong kernel, 8192 x 4096", "problem": "nll of 3 of 64 tokens off by 0.5"}
    timing = {"ms": 12.3, "TFLOP/s": 530.0, "of the product's rate": 0.7}
    case = "linear_nll 8192 x 4096 -> 128256, bf16 (Llama-3.1-8B)"
    return {
        "steps": {
            "smoke_head": {"status": "ok", "seconds": 1.0, "findings": [wrong]},
            "tests": {
                "status": "killed by 9",
                "seconds": 9.0,
                "output": "x" * 9000 + "\nthe last line",
                "findings": [{"test": f"test_{k}", "outcome": "failed", "message": "m\n" * 300} for k in range(n)]
                + [{"test": "good", "outcome": "passed"}],
            },
            "linear_nll": {
                "status": "ok",
                "seconds": 2.0,
                "findings": [
                    {"case": case, "timings": {"linear_nll": timing, "Liger": {"failed": "ImportError: " + "y" * 900}}}
                ]
                + [{"case": f"case {k}", "timings": {"z" * 400: timing}} for k in range(n)],
            },
        }
    }


def test_the_summary_says_failures_first_and_figures_beside_their_predictions():
    lines = summary(result_of(1)).splitlines()
    assert lines[0] == "FAILED: 4"
    assert lines[1] == "! tests: killed by 9: the last line"
    assert lines[2] == "! smoke_head: a wrong kernel, 8192 x 4096: nll of 3 of 64 tokens off by 0.5"
    assert lines[3].startswith("! tests: test_0: m m m")
    assert "Liger: ImportError" in lines[4]
    assert "tests: killed by 9, 9.0 s, 1 failed, 1 passed" in lines
    assert (
        " linear_nll 8192 x 4096 -> 128256, bf16 (Llama-3.1-8B): linear_nll 12.3 ms 530 TFLOP/s [500 to 560 =] x0.7"
        in lines
    )
    assert summary({"steps": {"well": {"status": "ok", "seconds": 1.0, "findings": []}}}).startswith("nothing failed")


def test_what_cannot_be_shown_costs_its_step_only():
    odd = {"status": "ok", "seconds": 1.0, "findings": [{"case": "c", "timings": {"call": {"ms": "long"}}}]}
    text = summary({"steps": {"odd": odd} | result_of(0)["steps"]})
    assert "the rest cannot be shown: ValueError" in text
    assert "530 TFLOP/s" in text


def test_of_a_sweep_the_fastest_comes_first():
    findings = [
        {
            "case": f"case {ms}",
            "sweep": "D 1536",
            "variant": f"v{ms}",
            "timings": {"cuBLAS product alone": {"ms": 1.0}, "nll": {"ms": ms, "TFLOP/s": 1000 / ms}},
        }
        for ms in (3.0, 2.0, 4.0)
    ]
    text = summary({"steps": {"head_tiles": {"status": "ok", "seconds": 1.0, "findings": findings}}})
    assert " D 1536, TFLOP/s of nll: v2.0 500, v3.0 333, v4.0 250" in text.splitlines()


def test_what_is_told_after_each_round_is_shown_once():
    rounds = [{"case": "a", "problem": "off", "timings": {"call": {"ms": float(n)}}} for n in range(3)]
    text = summary({"steps": {"engine": {"status": "ok", "seconds": 1.0, "findings": rounds}}})
    assert text.count("! engine: a: off") == 1
    assert re.findall(r"call .*", text) == ["call 2 ms"]


def test_space_is_shared_so_that_the_short_are_whole():
    assert shares([10, 5, 100, 200], 1000) == [10, 5, 100, 200]
    assert shares([10, 500, 100, 500], 400) == [10, 145, 100, 145]
    assert shares([], 400) == []


@pytest.mark.parametrize("n", [0, 10, 300])
def test_the_summary_fits_what_is_seen_of_the_output(n):
    result = result_of(n)
    result["steps"] |= {f"step {k}": result["steps"]["linear_nll"] for k in range(20)}
    text = summary(result)
    assert len(text) < SEEN - 400
    assert "FAILED" in text
    assert text.count("530 TFLOP/s") >= 20
    # Of the last step too.
    assert "step 19: ok, 2.0 s" in text
    if n == 300:
        assert "more lines in the JSON" in text


def test_what_was_compiled_travels(tmp_path, monkeypatch):
    there, here, archive = tmp_path / "there", tmp_path / "here", tmp_path / "out" / "tcache.tgz"
    for number, name in enumerate(("old", "new")):
        (there / name).mkdir(parents=True)
        for suffix in (".cubin", ".json", ".ptx", ".ttir"):
            (there / name / f"kernel{suffix}").write_bytes(os.urandom(200_000))
        os.utime(there / name, (number, number))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(there))
    assert "2 of 2 compiled kernels" in gpu_check.pack_cache(archive)
    with monkeypatch.context() as patch:
        patch.setattr(gpu_check, "CACHE_BYTES", 1000)
        assert "1 of 2" in gpu_check.pack_cache(tmp_path / "short.tgz")
        with tarfile.open(tmp_path / "short.tgz") as packed:
            assert packed.getnames() == ["new/kernel.cubin", "new/kernel.json"]

    monkeypatch.setenv("TRITON_CACHE_DIR", str(here))
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "CARRIED", tmp_path / "carried.tgz")
    assert "compiled anew" in gpu_check.unpack_cache()
    (tmp_path / "carried.tgz").write_bytes(archive.read_bytes()[:250_000])
    assert "cannot be unpacked" in gpu_check.unpack_cache()
    archive.replace(tmp_path / "carried.tgz")
    assert "unpacked into" in gpu_check.unpack_cache()
    assert sorted(path.name for path in here.rglob("*.*")) == [
        "kernel.cubin",
        "kernel.cubin",
        "kernel.json",
        "kernel.json",
    ]
    assert (here / "old" / "kernel.cubin").read_bytes() == (there / "old" / "kernel.cubin").read_bytes()


def test_the_folder_that_travels_is_ignored():
    folder = f"/{gpu_check.CARRIED.parent.relative_to(ROOT)}/"
    assert folder in (ROOT / ".gitignore").read_text().splitlines()
    assert folder.strip("/") in str(gpu_check.__doc__)


def test_results_of_tests_are_kept_one_by_one(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest, time\n"
        "def test_a(): pass\n"
        "def test_b(): assert 1 == 2, 'one is not two'\n"
        "@pytest.mark.skip(reason='why not')\n"
        "def test_c(): pass\n"
        "def test_d(): time.sleep(300)\n"
    )
    findings = tmp_path / "found.jsonl"
    path = os.pathsep.join([str(GPU), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-v", "-p", "gpu_tests", "-p", "no:cacheprovider", "test_some.py"],
        cwd=tmp_path,
        env=os.environ | {FINDINGS: str(findings), "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: findings.exists() and findings.read_text().count("\n") == 3)
    finally:
        process.kill()
        process.wait()
    found = [json.loads(line) for line in findings.read_text().splitlines()]
    assert [(one["test"].partition("::")[2], one["outcome"]) for one in found] == [
        ("test_a", "passed"),
        ("test_b", "failed"),
        ("test_c", "skipped"),
    ]
    assert "one is not two" in found[1]["message"]


def test_time_in_which_no_kernel_runs():
    from gpu_timing import busy, kernel_table

    events = [("a _range_kernel", 0.0, 10.0), ("b", 5.0, 12.0), ("b", 6.0, 7.0), ("c", 16.0, 20.0)]
    shares = busy(events)
    assert shares["no kernel runs"] == pytest.approx(4 / 20)
    assert shares["share of _range_kernel"] == pytest.approx(10 / 20)
    assert busy([]) == {}
    assert kernel_table(events)[0].split() == ["45.5%", "0.010", "ms", "1", "x", "a", "_range_kernel"]
    assert kernel_table(events)[1].split()[-3:] == ["2", "x", "b"]


def test_varlen_attention_is_asked_in_the_words_of_its_version():
    pytest.importorskip("triton")
    from gpu_attention import causal_options

    def of_2_11(
        query, key, value, ends, key_ends, most, key_most, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        """Heads are grouped without a word."""

    def of_2_13(query, key, value, ends, key_ends, most, key_most, *, window_size=(-1, -1), enable_gqa=False): ...
    def of_2_10(query, key, value, ends, key_ends, most, key_most, is_causal=False): ...
    def of_flash(q, k, v, ends, key_ends, most, key_most, dropout_p=0.0, causal=False, window_size=(-1, -1)): ...

    assert causal_options(of_2_11) == {"window_size": (-1, 0)}
    assert causal_options(of_2_13) == {"window_size": (-1, 0), "enable_gqa": True}
    assert causal_options(of_2_10) == {"is_causal": True}
    assert causal_options(of_flash) == {"causal": True}


def test_a_peer_that_lacks_its_options_is_left_out(monkeypatch):
    pytest.importorskip("triton")
    import torch
    from gpu_head import draw, heads, peers

    (head,) = heads("cpu")
    monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy", lambda *tensors, **options: None, raising=False)
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    names = peers(head, *draw(head, "cpu"))
    assert "F.linear_cross_entropy" in names
    assert "F.linear_cross_entropy, chunked" not in names


def test_the_package_that_is_put_together_names_its_version(tmp_path):
    gpu_check.assemble(tmp_path / "build")
    code = "import fastcompat, importlib.metadata as m; print(fastcompat.__file__, m.version('fastcompat'))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path / "build")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == [str(tmp_path / "build" / "fastcompat" / "__init__.py"), "0.1.0"]


def test_a_wrong_kernel_is_a_problem_and_a_right_one_is_none(monkeypatch):
    pytest.importorskip("triton")
    import gpu_smoke

    mend()
    known: dict[tuple, object] = {}
    right = gpu_smoke.linear_nll

    def remembered(hidden, weight, target, *, tiles, **options):
        key = len(hidden), *sorted(options.items())
        if key not in known:
            known[key] = right(hidden, weight, target, **options)
        if tiles == "raises":
            raise ZeroDivisionError("no such tiles")
        return known[key] + {None: 0.0, "off": 2e-3, "NaN": float("nan"), "by batch": 1e-6 * len(hidden)}[tiles]

    monkeypatch.setattr(gpu_smoke, "linear_nll", remembered)
    monkeypatch.setattr(
        gpu_smoke, "head_variants", lambda *known: {name: name for name in ("off", "NaN", "by batch", "raises")}
    )
    said = {finding["case"].partition(", ")[0]: finding.get("problem", "") for finding in gpu_smoke.head("cpu")}
    assert said["linear_nll"] == ""
    assert "nll of" in said["off"]
    assert "nll of" in said["NaN"]
    assert "bits depend on its batch" in said["by batch"]
    assert "ZeroDivisionError" in said["raises"]


def test_rows_are_counted_whose_bits_other_rows_change(monkeypatch):
    import gpu_invariance
    import torch

    x, weight = torch.ones(16, 4), torch.ones(3, 4)
    assert gpu_invariance.differing(x, weight, (1, 2, 16)) == []
    product = torch.nn.functional.linear
    monkeypatch.setattr(gpu_invariance.F, "linear", lambda x, w: product(x, w) + (len(x) == 2))
    assert gpu_invariance.differing(x, weight, (1, 2, 16)) == [2]


def test_a_dry_run_of_a_cheap_step(tmp_path):
    """As somebody types it; the others are tried by hand (`make gpu-check-dry-run`)."""
    command = [sys.executable, GPU / "gpu_check.py", "--dry-run", "--only", "invariance", "--output", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "gpu_check-cpu-dry-run-first.json").read_text())
    assert found["dry_run"]
    assert found["steps"]["invariance"]["status"] == "ok"
    assert found["steps"]["invariance"]["findings"][0]["figures"]["default"] == {"other bits with": "no number of rows"}
    assert "nothing failed" in result.stdout


def test_a_machine_without_what_pages_and_zstd_need_scores():
    code = """
import sys
for lacking in ("altair", "backports", "backports.zstd", "compression.zstd"):
    sys.modules[lacking] = None
import fastcompat.cli.application, fastcompat.cli.score, fastcompat.corpus
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--call", "first"])
    monkeypatch.setattr(gpu_check, "_gpu_name", lambda: "")
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert gpu_check.main() == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "finds none" in capsys.readouterr().out


def test_problems_are_told_apart():
    assert gpu_steps.problem({"case": "well"}) == ""
    assert gpu_steps.problem({"test": "t", "outcome": "failed"}) == "failed"
    assert gpu_steps.problem({"problem": "off"}) == "off"
