"""Everything that only a GPU can tell, in two calls of about five minutes; a third is for what can wait.

    python3 bench/gpu/gpu_check.py --call first [--output $OUT]       245 s: is it right, and where does the time go
    python3 bench/gpu/gpu_check.py --call second [--output $OUT]      365 s: how fast, beside peers and variants
    python3 bench/gpu/gpu_check.py --call third                       rewards, long prompts, experts, memory
    python3 bench/gpu/gpu_check.py --dry-run                          all of it on a CPU, tiny; figures mean nothing

Needs a GPU, and a Python with torch, triton, transformers, numpy, pyarrow and pytest (pytest-xdist where it is there).
fastcompat need not be installed: the package is put together under build/gpu-check. `--only STEP ...` runs these alone.

Every step is a process with its own limit, so that what fails, hangs or is killed costs itself only; what one does not
need of the time goes to the others. Where nothing is timed, steps run side by side. The JSON is whole at any time:
gpu_check-GPU-CALL.json. The last lines printed are the summary, at most 12,000 characters of it. What else limits the
time of a call should leave it ten seconds more.

What Triton compiled in one call spares the next one a minute. The first leaves it beside its JSON as tcache.tgz; put
into .gpu-check/ at the root of the tree in which the second call runs, it is unpacked there. Git ignores that folder:
what copies a tree to a machine with a GPU has to be told to carry it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_steps import Step, allowance, problem, run_side_by_side
from gpu_summary import summary

ROOT = Path(__file__).resolve().parents[2]
# The package as put together, findings and logs, by device: a dry run disturbs no check.
BUILD = {"cuda": ROOT / "build" / "gpu-check", "cpu": ROOT / "build" / "gpu-check-dry-run"}
CARRIED = ROOT / ".gpu-check" / "tcache.tgz"
CACHE_BYTES = 15 << 20  # of the archive
# What a cached kernel is started from; the rest of it is text for people.
CACHED = (".cubin", ".hsaco", ".json", ".so")
DRY_RUN_SECONDS = 1800.0
AT_THE_END = 8.0  # seconds for the archive and the summary
LEAST = 5.0  # seconds with which a group is begun

STEPS = {
    "hardware": Step(target="gpu_timing:hardware", seconds=14),
    "smoke_head": Step(target="gpu_smoke:head", seconds=112),
    "smoke_attention": Step(target="gpu_smoke:attention", seconds=112),
    "smoke_rest": Step(target="gpu_smoke:elementwise_and_rows", seconds=112),
    "tests": Step(target="gpu_tests:tests", seconds=112),
    "profile_0_5b": Step(target="gpu_profile:qwen2_5_0_5b", seconds=28),
    "profile_8b": Step(target="gpu_profile:llama_3_1_8b", seconds=36),
    "pipeline": Step(target="gpu_pipeline:pipeline", seconds=30),
    "invariance": Step(target="gpu_invariance:invariance", seconds=12),
    "engine_0_5b": Step(target="gpu_engine:qwen2_5_0_5b", seconds=40),
    "engine_8b": Step(target="gpu_engine:llama_3_1_8b", seconds=50),
    "engine_3b": Step(target="gpu_engine:llama_3_2_3b", seconds=35),
    "linear_nll": Step(target="gpu_head:linear_nll_beside_its_peers", seconds=50),
    "attention": Step(target="gpu_attention:attention_beside_its_peers", seconds=32),
    "head_tiles": Step(target="gpu_head:tile_sweep", seconds=60),
    "mlp_pieces": Step(target="gpu_layers:mlp_in_pieces", seconds=12),
    "elementwise": Step(target="gpu_layers:elementwise_beside_its_peers", seconds=20),
    "packed_nll": Step(target="gpu_rows:packed_nll_beside_its_peers", seconds=14),
    "segment_sum": Step(target="gpu_rows:segment_sum_beside_its_peers", seconds=10),
    "row_tiles": Step(target="gpu_rows:tile_sweep", seconds=14),
    "rewards": Step(target="gpu_later:rewards", seconds=60),
    "context": Step(target="gpu_later:context", seconds=60),
    "reasoning": Step(target="gpu_later:reasoning", seconds=60),
    "experts": Step(target="gpu_later:experts", seconds=40),
    "segments_fixed": Step(target="gpu_later:segments", seconds=40),
    "segments_expandable": Step(
        target="gpu_later:segments", seconds=40, environment={"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    ),
    "compiled_elementwise": Step(target="gpu_later:compiled_elementwise", seconds=60),
    "compiled_attention": Step(target="gpu_later:compiled_attention", seconds=60),
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """Groups of steps, one group after the other, and the seconds for all of it. A step that times is a group alone."""

    seconds: float
    groups: tuple[tuple[str, ...], ...]


CALLS = {
    "first": Call(
        seconds=245,
        groups=(
            ("hardware",),
            ("smoke_head", "smoke_attention", "smoke_rest", "tests"),
            ("profile_0_5b",),
            ("profile_8b",),
            ("pipeline",),
            ("invariance",),
        ),
    ),
    # What a visit is worth most for comes first.
    "second": Call(
        seconds=365,
        groups=(
            ("hardware",),
            ("engine_0_5b",),
            ("engine_8b",),
            ("linear_nll",),
            ("attention",),
            ("head_tiles",),
            ("engine_3b",),
            ("elementwise",),
            ("packed_nll",),
            ("mlp_pieces",),
            ("segment_sum",),
            ("row_tiles",),
        ),
    ),
    "third": Call(
        seconds=480,
        groups=(
            ("hardware",),
            ("rewards",),
            ("context",),
            ("reasoning",),
            ("experts",),
            ("segments_fixed",),
            ("segments_expandable",),
            ("compiled_attention",),
            ("compiled_elementwise",),
        ),
    ),
}


def assemble(build: Path) -> None:
    """fastcompat in a folder: src/fastcompat, kernels/ as its subpackage, and the metadata that names a version."""
    shutil.rmtree(build, ignore_errors=True)
    source, ignored = ROOT / "src" / "fastcompat", shutil.ignore_patterns("__pycache__", "*.so")

    def left_out(directory: str, names: list[str]) -> set[str]:
        # An editable installation links kernels/ there.
        return ignored(directory, names) | ({"kernels"} if Path(directory) == source else set())

    shutil.copytree(source, build / "fastcompat", ignore=left_out)
    shutil.copytree(ROOT / "kernels", build / "fastcompat" / "kernels", ignore=ignored)
    found = re.search(r'__version__ = "(.+)"', (build / "fastcompat" / "version.py").read_text())
    assert found, "src/fastcompat/version.py names no version"
    metadata = build / f"fastcompat-{found[1]}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: fastcompat\nVersion: {found[1]}\n")


def environment_of(device: str) -> dict[str, str]:
    """Of every step: the package as put together, the folders of the scripts, Triton's cache."""
    folders = (BUILD[device], ROOT / "bench" / "gpu", ROOT / "bench")
    path = os.pathsep.join(filter(None, (*map(str, folders), os.environ.get("PYTHONPATH"))))
    environment = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        return environment | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return environment | {"TRITON_CACHE_DIR": str(cache_directory())}


def cache_directory() -> Path:
    """One place on every machine, because what is cached names its files by whole paths."""
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "gpu-check")


def pack_cache(archive: Path) -> str:
    """Write what Triton compiled, the newest first, as far as CACHE_BYTES go; says what was done."""
    found = [path for path in cache_directory().glob("*") if path.is_dir()]
    kernels, n_kernels = sorted(found, key=lambda path: path.stat().st_mtime, reverse=True), 0
    archive.parent.mkdir(parents=True, exist_ok=True)
    with archive.open("wb") as file, tarfile.open(fileobj=file, mode="w:gz", compresslevel=5) as packed:
        for kernel in kernels:
            if file.tell() > CACHE_BYTES:
                break
            for path in sorted(kernel.iterdir()):
                if path.suffix in CACHED:
                    packed.add(path, arcname=str(path.relative_to(cache_directory())))
            n_kernels += 1
    return f"{n_kernels} of {len(kernels)} compiled kernels, {archive.stat().st_size >> 10} KiB, in {archive}"


def unpack_cache() -> str:
    """Put what an earlier call compiled where Triton looks; says what was done."""
    if not CARRIED.exists():
        return f"no {CARRIED.relative_to(ROOT)}: everything is compiled anew"
    cache_directory().mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(CARRIED) as packed:
            packed.extractall(cache_directory(), filter="data")
    except (OSError, tarfile.TarError, EOFError) as error:
        return f"{CARRIED.relative_to(ROOT)} cannot be unpacked ({error}): everything is compiled anew"
    return f"{CARRIED.relative_to(ROOT)} unpacked into {cache_directory()}"


def write(path: Path, result: dict[str, Any]) -> None:
    """At once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


class Check:
    """One call's steps, and its JSON as it grows."""

    def __init__(self, path: Path, device: str, *, steps: dict[str, Step] = STEPS) -> None:
        self._path, self._device, self._steps = path, device, steps
        self.result: dict[str, Any] = {"dry_run": device == "cpu", "steps": {}}

    def run(self, groups: Iterable[Sequence[str]], seconds: float) -> None:
        """One group after the other, each written as soon as it is there; those without time left are named."""
        deadline = time.monotonic() + seconds
        left = [list(group) for group in groups]
        while left:
            group, *left = left
            planned, *later = (max(self._steps[name].seconds for name in names) for names in (group, *left))
            remaining = deadline - time.monotonic()
            limit = remaining if self._device == "cpu" else allowance(planned, sum(later), remaining)
            if limit < min(LEAST, planned):
                self._keep({step: {"status": "no time was left", "seconds": 0.0, "findings": []} for step in group})
                continue
            print(f"{', '.join(group)}: {limit:.0f} s at most", flush=True)
            run_side_by_side(
                {name: self._steps[name] for name in group},
                seconds=limit,
                device=self._device,
                folder=BUILD[self._device],
                environment=environment_of(self._device),
                keep=self._keep,
            )

    def note(self, name: str, value: str) -> None:
        """Something beside the steps."""
        self.result[name] = value
        print(value, flush=True)
        write(self._path, self.result)

    @property
    def failed(self) -> bool:
        entries = self.result["steps"].values()
        wrong = any(problem(finding) for entry in entries for finding in entry["findings"])
        return wrong or any(entry["status"] != "ok" for entry in entries)

    def _keep(self, entries: dict[str, dict[str, Any]]) -> None:
        self.result["steps"] |= entries
        write(self._path, self.result)


def run_call(name: str, only: Sequence[str] | None, device: str, output: Path, seconds: float | None) -> bool:
    """One call, and its summary as the last that is printed; whether everything was right."""
    call = CALLS[name]
    groups = [[step for step in group if only is None or step in only] for group in call.groups]
    groups = [group for group in groups if group]
    if not groups:
        return True
    began = time.monotonic()
    seconds = seconds or (DRY_RUN_SECONDS if device == "cpu" else call.seconds)
    assemble(BUILD[device])
    where = "cpu-dry-run" if device == "cpu" else _gpu_name()
    path = output / f"gpu_check-{where}-{name}.json"
    check = Check(path, device)
    try:
        if device != "cpu":
            check.note("carried", unpack_cache())
        check.run(groups, seconds - AT_THE_END - (time.monotonic() - began))
        if device != "cpu" and name == "first":
            with contextlib.suppress(OSError, tarfile.TarError):
                check.note("packed", pack_cache(output / "tcache.tgz"))
    finally:
        # Also when it is interrupted: what there is by then.
        print(f"\n{name} call, {time.monotonic() - began:.0f} s, {path}")
        print(summary(check.result), flush=True)
    return not check.failed


def _gpu_name() -> str:
    """Of the first GPU, for a file's name. Without torch here, whose context would hold memory all the time."""
    code = "import torch; print(torch.cuda.get_device_name())"
    for command in (
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
        [sys.executable, "-c", code],
    ):
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if found.returncode == 0 and found.stdout.strip():
            return re.sub(r"[^a-z0-9]+", "-", found.stdout.splitlines()[0].lower()).strip("-")
    return ""


def _interrupted(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", nargs="+", choices=CALLS, help="default: first and second; of a dry run all")
    parser.add_argument("--output", type=Path, help="a folder; default: bench/results")
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--seconds", type=float, help="for a call, instead of its own")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupted)
    device = "cpu" if arguments.dry_run else "cuda"
    if device == "cuda" and not _gpu_name():
        print("gpu_check needs a GPU, and finds none (--dry-run tries the steps on the CPU)")
        return 2
    calls = arguments.call or (list(CALLS) if arguments.dry_run or arguments.only else ["first", "second"])
    output = arguments.output or (ROOT / "build" if arguments.dry_run else ROOT / "bench" / "results")
    done = [run_call(name, arguments.only, device, output, arguments.seconds) for name in calls]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
