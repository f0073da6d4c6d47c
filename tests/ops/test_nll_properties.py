"""What holds for every problem: equal bits whatever the threads and the order of rows, and memory of a tile's size."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nll_problems import BACKENDS, NATIVE, each_backend, interpreted, problem

from fastcompat import linear_nll, packed_nll
from fastcompat.ops.nll import STATISTICS

# The same examples in every run; compiled kernels have no steady time for a deadline.
quickly = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", NATIVE)
@quickly
@given(
    n_scored=st.integers(1, 150),
    width=st.integers(1, 80),
    vocabulary=st.integers(1, 1500),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    threads=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
@example(n_scored=65, width=33, vocabulary=20_011, dtype=torch.bfloat16, threads=3, seed=0)
@example(n_scored=3, width=2, vocabulary=100_003, dtype=torch.float32, threads=4, seed=0)
def test_equal_bits_for_any_threads_and_order_of_rows(backend, n_scored, width, vocabulary, dtype, threads, seed):
    p = problem(n_scored, width, vocabulary, dtype, seed=seed)
    options = {"statistics": STATISTICS, "backend": backend}
    torch.set_num_threads(1)
    want = torch.stack(linear_nll(*p, **options))
    logits = torch.nn.functional.linear(p.hidden.float(), p.weight.float())
    want_packed = torch.stack(packed_nll(logits, p.target, **options))
    torch.set_num_threads(threads)
    order = torch.randperm(n_scored, generator=torch.Generator().manual_seed(seed))
    got = torch.stack(linear_nll(p.hidden[order], p.weight, p.target[order], **options))
    got_packed = torch.stack(packed_nll(logits[order], p.target[order], **options))
    assert torch.equal(got, want[:, order])
    assert torch.equal(got_packed, want_packed[:, order])
    one = slice(n_scored // 2, n_scored // 2 + 1)
    assert torch.equal(torch.stack(linear_nll(p.hidden[one], p.weight, p.target[one], **options)), want[:, one])


@each_backend
def test_two_runs_give_equal_bits(backend, device):
    n_scored, vocabulary = (5, 500) if interpreted(backend, device) else (70, 20_011)
    p = problem(n_scored, 48, vocabulary, torch.bfloat16).to(device)
    logits = p.hidden.float() @ p.weight.float().T
    options = {"statistics": STATISTICS, "backend": backend}
    for function, arguments in ((linear_nll, p), (packed_nll, (logits, p.target))):
        first, second = (torch.stack(function(*arguments, **options)) for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize(("backend", "device"), [pair for pair in BACKENDS if ":" not in pair[0]])
@quickly
@given(lengths=st.lists(st.integers(0, 600), max_size=8), seed=st.integers(0, 1000))
def test_a_responses_sum_depends_on_its_own_tokens_alone(backend, device, lengths, seed):
    segment_sum = torch.ops.fastcompat.segment_sum
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0)
    values = torch.randn(2, sum(lengths), generator=torch.Generator().manual_seed(seed)).to(device)
    sums = segment_sum(values, cu_seqlens, backend)
    assert sums.shape == (2, len(lengths))
    for n, part in enumerate(values.split(lengths, dim=1) if lengths else ()):
        alone = segment_sum(part, torch.tensor([0, lengths[n]], device=device), backend)
        assert torch.equal(alone[:, 0], sums[:, n])
        torch.testing.assert_close(alone[:, 0], part.double().sum(1), rtol=1e-12, atol=1e-12)


GROWTH = """
import torch
from fastcompat import linear_nll
torch.set_num_threads(1)
def peak():
    # Not ru_maxrss: that of the process which started this one is its lower bound.
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) >> 10
hidden, weight = torch.randn(2048, {2}, dtype={4}), torch.randn({3}, {2}, dtype={4})
target = torch.randint({3}, (2048,))
linear_nll(hidden[:16], weight, target[:16], backend={0!r})
before = peak()
linear_nll(hidden, weight, target, backend={0!r})
linear_nll(hidden, weight, target, backend={0!r}, statistics={1!r})
after = peak()
ballast = torch.ones(64 << 20)
print(after - before, peak() - after)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("backend", "width", "vocabulary", "dtype", "most_mib"),
    [
        # 2,048 x 151,936 logits would be 1,187 MiB in float32, 594 in bfloat16.
        *((name, 16, 151_936, torch.float32, 8) for name in NATIVE[:1]),
        # A wide head, whose packed rows would be 9 MiB if all were packed at once; 156 MiB of logits.
        *((name, 2304, 20_000, torch.bfloat16, 8) for name in NATIVE[:1]),
        ("torch", 16, 151_936, torch.float32, 100),
    ],
)
def test_no_matrix_of_logits_is_ever_allocated(backend, width, vocabulary, dtype, most_mib):
    code = GROWTH.format(backend, STATISTICS, width, vocabulary, dtype)
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    growth, growth_of_256_mib = map(int, result.stdout.split())
    assert growth <= most_mib
    assert growth_of_256_mib > 128  # the peak does move where memory is allocated
