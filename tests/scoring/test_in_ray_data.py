"""`map_batches(fc.Scorer, ...)` of the real Ray Data: ten blocks, two actors, the figures of one process."""

from __future__ import annotations

import json
import os
import shutil
import tempfile

import pytest
from command_line import run_script

import fastcompat as fc
from fastcompat.demo import model_directory

pytest.importorskip("ray", reason="Ray is not installed: pip install 'fastcompat[ray]'")
pytest.importorskip("ray.data", reason="Ray Data is not installed: pip install 'ray[data]'")

pytestmark = pytest.mark.long

ROWS = [
    {"n": n, "prompt": f"What is {n // 4}?", "response": None if n < 4 else f"It is {n}, I think."} for n in range(40)
]
SCRIPT = """
import json, logging, sys
import ray, ray.data
import fastcompat as fc
model, rows = sys.argv[1], json.loads(sys.argv[2])
try:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
             object_store_memory=100 << 20)
except Exception as error:
    if "timed out during startup" not in str(error):
        raise
    print(json.dumps(None))
    sys.exit()
ray.data.DataContext.get_current().enable_progress_bars = False
blocks = ray.data.from_items(rows, override_num_blocks=10)
sizes = [len(ray.cloudpickle.dumps(thing)) for thing in (fc.Scorer, fc.Scorer(model, device="cpu"))]
scored = blocks.map_batches(
    fc.Scorer, fn_constructor_args=[model], fn_constructor_kwargs={"device": "cpu"}, batch_format="pyarrow",
    compute=ray.data.ActorPoolStrategy(size=2)
)
rows = sorted(scored.take_all(), key=lambda row: row["n"])
print(json.dumps([sizes, rows]))
"""


def test_ten_blocks_and_two_actors_give_what_one_process_does():
    place = tempfile.mkdtemp(prefix="r", dir="/tmp" if os.path.isdir("/tmp") else None)  # sockets have short names
    try:
        said = run_script(
            SCRIPT,
            str(model_directory()),
            json.dumps(ROWS),
            seconds=400,
            RAY_TMPDIR=place,
            RAY_AUTH_MODE="disabled",
            RAY_USAGE_STATS_ENABLED="0",
            OMP_NUM_THREADS="1",
        )
    finally:
        shutil.rmtree(place, ignore_errors=True)
    found = json.loads(said.splitlines()[-1])
    if found is None:
        pytest.skip("this machine is too busy for Ray, which gives itself 30 seconds to start")
    sizes, rows = found
    assert max(sizes) < 10_000
    want = fc.Scorer(str(model_directory()), device="cpu").score(ROWS).to_pylist()
    assert [row["n"] for row in rows] == list(range(40))
    assert [row["status"] for row in rows] == [row["status"] for row in want]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in want])
    assert list(rows[0]) == ["n", "prompt", "response", "loss", "nll_sum", "n_tokens", "status", "detail"]
    assert [row["loss"] for row in rows[:4]] == [None] * 4
