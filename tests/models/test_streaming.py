"""A model whose layers come and go gives the bits of the one that stays: every family, stored in every way."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCABULARY, small_model
from reward_makers import classifier
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizer_makers import make_tokenizer

from fastcompat.errors import ModelError
from fastcompat.models import layer_store
from fastcompat.models.checkpoint import stored_tensors
from fastcompat.models.configuration import ModelSettings
from fastcompat.models.layer_store import Files, HostSlot, Layout, Piece, Place
from fastcompat.models.loading import load_causal_lm, load_reward_model
from fastcompat.models.streamed_layers import GivenUp, Streaming
from fastcompat.tokens.forest import pack_forest

# In whose layers something is kept from one to the next.
ONE_AFTER_THE_OTHER = "Gemma-4 (shared keys, inputs per layer)"
# Phi-3's long factors count from 64 tokens on.
LENGTHS = ((30, 8, 41), (25, 60), (7, 33, 20))


def refused(n_bytes: int) -> Exception:
    return ModelError(f"it takes {n_bytes} bytes")


def streaming(*, free: int = 1 << 30, cache: int = 0, required: bool = True) -> Streaming:
    return Streaming(free=lambda: free, cache=lambda: cache, work_bytes=0, refuse=refused, required=required)


def forests():
    generator = np.random.default_rng(0)
    found = []
    for lengths in LENGTHS:
        stem = generator.integers(3, VOCABULARY, size=11)
        ids = [np.concatenate([stem, generator.integers(3, VOCABULARY, size=n)]).astype(np.int32) for n in lengths]
        found += pack_forest(ids, [np.arange(len(x)) >= len(stem) for x in ids], token_budget=1 << 20)
    return found


def plans(model):
    return [model.plan(forest, forest.predictors).to(model.device) for forest in forests()]


def bits(model) -> list[torch.Tensor]:
    """Hidden states and losses of every pack, one by one where all layers stay."""
    found = []
    for plan, hidden in zip(plans(model), model.march(plans(model)), strict=True):
        found += [hidden, model.target_statistics(hidden, plan, ("nll", "entropy"))]
    return found


def assert_equal(got, want) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_of_every_family(family, tmp_path):
    """Experts lie unmerged in their files, every other family in shards that end inside of layers."""
    shards = {} if list(FAMILIES).index(family) % 2 else {"max_shard_size": "40KB"}
    small_model(family).save_pretrained(tmp_path, **shards)
    resident, streamed = (load_causal_lm(str(tmp_path), streaming=how) for how in (None, streaming()))
    assert streamed.fusions == resident.fusions
    assert (streamed.prunes, streamed.windows) == (resident.prunes, resident.windows)
    assert streamed.layers.marches == (family != ONE_AFTER_THE_OTHER)
    want = bits(resident)
    assert_equal(bits(streamed), want)
    # One pack after the other, through the body's own loop.
    alone = [streamed.hidden(plan) for plan in plans(streamed)]
    assert_equal(alone, want[::2])
    # Between packs no layer has weights.
    assert all(weight.is_meta for module in streamed.layers._modules for weight in module.parameters())


@pytest.mark.parametrize(
    ("stored", "computed"),
    [(torch.bfloat16, "float32"), (torch.float16, "float32"), (torch.float32, "bfloat16")],
)
def test_another_dtype_than_the_stored_one(stored, computed, tmp_path):
    small_model("Qwen2").to(stored).save_pretrained(tmp_path)
    settings = ModelSettings(dtype=computed)
    want = bits(load_causal_lm(str(tmp_path), settings))
    assert_equal(bits(load_causal_lm(str(tmp_path), settings, streaming=streaming())), want)


def test_bfloat16_as_it_is_stored_and_past_the_page_cache(tmp_path, monkeypatch):
    """The first layers are read in both ways, so all of them are here."""
    monkeypatch.setattr(layer_store, "STAGING_BYTES", 2 * layer_store.BLOCK)
    small_model("Gemma-2", dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="70KB")
    settings = ModelSettings(dtype="bfloat16")
    want = bits(load_causal_lm(str(tmp_path), settings))
    model = load_causal_lm(str(tmp_path), settings, streaming=streaming())
    for direct in (True, False):
        monkeypatch.setattr(Files, "choose", lambda files, turn, direct=direct: setattr(files, "direct", direct))
        assert_equal(bits(model), want)


@pytest.mark.parametrize("family", ["Llama", "Qwen3-MoE", "GPT-2"])
def test_rewards(family, tmp_path):
    classifier(family).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    resident, streamed = (load_reward_model(str(tmp_path), streaming=how) for how in (None, streaming()))
    assert streamed.layers.marches
    for forest in forests():
        reads = forest.path_end.astype(np.int64)
        assert (streamed.rewards(forest, reads) == resident.rewards(forest, reads)).all()


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "llama"
    small_model("Llama").save_pretrained(directory, max_shard_size="100KB")
    return directory


def test_layers_are_read_once_for_all_packs(llama):
    model = load_causal_lm(str(llama), streaming=streaming())
    n_layers = model.layers.n_layers
    list(model.march(plans(model)))  # the two first ones are in their slots from here on
    before = model.layers.store._turn
    list(model.march(plans(model)))
    assert model.layers.store._turn - before == n_layers
    for plan in plans(model):
        model.hidden(plan)
    assert model.layers.store._turn - before == (1 + len(LENGTHS)) * n_layers


def test_a_march_that_is_given_up_leaves_nothing_behind(llama):
    model = load_causal_lm(str(llama), streaming=streaming())
    want = bits(model)
    asked = []

    def given_up() -> bool:
        asked.append(None)
        return len(asked) == 2

    with pytest.raises(GivenUp):
        list(model.march(plans(model), given_up))
    assert_equal(bits(model), want)


def test_what_happens_between_layers_is_noticed(llama, monkeypatch):
    """A body that adds to the states itself goes its own way, with the bits that it gives resident."""
    from transformers.models.llama import modeling_llama

    own = modeling_llama.LlamaModel.forward
    own = getattr(own, "__wrapped__", own)

    def forward(self, input_ids=None, position_ids=None, attention_mask=None, **kwargs):
        hidden = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        angles = self.rotary_emb(hidden, position_ids=position_ids)
        # Alone it needs a mask of its own, since it does not ask transformers for one.
        mask = None
        if self.config._attn_implementation == "eager":
            n_tokens = hidden.shape[1]
            mask = torch.full((n_tokens, n_tokens), torch.finfo(hidden.dtype).min).triu(1)[None, None]
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=angles, position_ids=position_ids)
            hidden = hidden + 0.25 * hidden.roll(1, -1)
        return modeling_llama.BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)
    resident, streamed = (load_causal_lm(str(llama), streaming=how) for how in (None, streaming()))
    assert not streamed.layers.marches
    assert streamed.tokens_at_once == 1
    assert_equal(bits(streamed), bits(resident))


def test_memory_that_is_too_small_is_refused_before_anything_is_read(llama):
    needed = []

    def refuse(n_bytes: int) -> Exception:
        needed.append(n_bytes)
        return refused(n_bytes)

    small = Streaming(free=lambda: 1000, cache=lambda: 0, work_bytes=123, refuse=refuse, required=True)
    with pytest.raises(ModelError, match="it takes"):
        load_causal_lm(str(llama), streaming=small)
    enough = Streaming(free=lambda: needed[0], cache=lambda: 0, work_bytes=123, refuse=refuse, required=True)
    assert load_causal_lm(str(llama), streaming=enough).layers is not None


def test_a_shard_that_is_cut_off_is_refused(llama, tmp_path):
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 100)
    with pytest.raises(ModelError, match=f"{shard.name} is damaged"):
        load_causal_lm(str(tmp_path), streaming=streaming())


def test_a_shard_that_shrinks_later_is_an_error_and_no_figure(llama, tmp_path):
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = load_causal_lm(str(tmp_path), streaming=streaming())
    list(model.march(plans(model)))
    for shard in tmp_path.glob("*.safetensors"):
        os.truncate(shard, 4096)
    with pytest.raises(ModelError, match="was changed while it was read"):
        list(model.march(plans(model)))  # though two layers were read already


def test_weights_that_are_missing_are_named(tmp_path):
    model = small_model("Llama")
    model.save_pretrained(tmp_path)
    weights = {name: own.contiguous() for name, own in model.state_dict().items() if "layers.1.mlp.up" not in name}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the weights .*layers.1.mlp.up_proj"):
        load_causal_lm(str(tmp_path), streaming=streaming())


def test_what_cannot_stream_stays_unless_it_must(tmp_path, monkeypatch, caplog):
    from fastcompat.models import loading
    from fastcompat.models.skeleton import NotStreamable

    def refuse(*_):
        raise NotStreamable("its weights are upside down")

    small_model("Llama").save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "load_streamed", refuse)
    with pytest.raises(ModelError, match="cannot be streamed: its weights are upside down"):
        load_causal_lm(str(tmp_path), streaming=streaming())
    assert load_causal_lm(str(tmp_path), streaming=streaming(required=False)).layers is None
    assert "and stay: its weights are upside down" in caplog.text


def test_stretches_of_files_cover_every_piece(tmp_path):
    """Any places in the file, any dtype that is converted, blocks and staging smaller than a piece."""
    generator = np.random.default_rng(1)
    content = generator.standard_normal(40_000).astype(np.float16)
    path = tmp_path / "values"
    path.write_bytes(b"12345678" + content.tobytes())
    pieces, places, at = [], {}, 0
    for k in range(12):
        first, n = int(generator.integers(0, 30_000)), int(generator.integers(1, 9_000))
        dtype = (torch.float16, torch.float32)[k % 2]
        places[str(k)] = Place(at=at, shape=(n,), dtype=dtype)
        pieces.append(Piece(path=path, offset=8 + 2 * first, n_bytes=2 * n, stored=torch.float16, at=at, dtype=dtype))
        at = -(-(at + places[str(k)].n_bytes) // 256) * 256
    slot, files = HostSlot(at), Files([path], 0)
    for direct in (False, True):
        files.direct = direct and bool(files._direct)
        slot._bytes[:] = 255
        slot.fill(Layout(places=places, pieces=pieces, n_bytes=at), files)
        for k, piece in enumerate(pieces):
            first = (piece.offset - 8) // 2
            want = torch.from_numpy(content[first : first + piece.n_bytes // 2]).to(piece.dtype)
            assert torch.equal(slot.view(places[str(k)]), want)
    files.close()


def test_stored_tensors_are_where_the_headers_say(llama):
    stored = stored_tensors(str(llama))
    from safetensors.torch import load_file

    values = {name: own for path in llama.glob("*.safetensors") for name, own in load_file(path).items()}
    assert stored.keys() == values.keys()
    for name, place in stored.items():
        raw = place.path.read_bytes()[place.offset : place.offset + place.n_bytes]
        assert torch.equal(torch.frombuffer(bytearray(raw), dtype=place.dtype).view(place.shape), values[name])


def test_forked_processes_read_side_by_side(tmp_path):
    """As `datasets` does it with several processes: threads do not survive a fork, and each converts what it reads."""
    small_model("Llama").to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_causal_lm(str(tmp_path), ModelSettings(dtype="float32"), streaming=streaming())
    want = bits(model)
    torch.set_num_threads(1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if all(all(map(torch.equal, bits(model), want)) for _ in range(5)) else 2
        finally:
            os._exit(code)
    for _ in range(5):
        assert_equal(bits(model), want)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("it waits for ever")
    assert os.waitstatus_to_exitcode(status) == 0


def test_two_threads_have_the_layers_by_turns(llama):
    model = load_causal_lm(str(llama), streaming=streaming())
    want = bits(model)
    with ThreadPoolExecutor(2) as threads:
        for got in threads.map(lambda _: bits(model), range(6)):
            assert_equal(got, want)


def test_memory_that_ran_out_is_remembered(llama):
    model = load_causal_lm(str(llama), streaming=streaming())
    layers = model.layers
    layers._wanted = before = layers.tokens_at_once + 1000
    model.ran_out()
    half = layers.tokens_at_once
    assert half <= before // 2
    list(model.march(plans(model)))
    assert layers.tokens_at_once <= half


@pytest.mark.parametrize("n_good", [0, 3, 40])
def test_a_read_error_names_the_file_and_says_nothing_of_the_model(llama, monkeypatch, n_good):
    """While it is loaded, and when it computes: it is never a model of which less is fused."""
    left, own = [n_good], os.preadv

    def preadv(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, "Input/output error")
        return own(*arguments)

    def use() -> None:
        model = load_causal_lm(str(llama), streaming=streaming())
        for _ in range(20):
            list(model.march(plans(model)))

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(ModelError, match=r"\.safetensors cannot be read \(Input/output error\)"):
        use()


def test_reads_that_are_short_or_not_possible_past_the_page_cache(tmp_path, monkeypatch):
    small_model("Llama").to(torch.bfloat16).save_pretrained(tmp_path)
    settings = ModelSettings(dtype="float32")
    want = bits(load_causal_lm(str(tmp_path), settings))
    own = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, to, at: own(file, [to[0][:5000]], at))
    assert_equal(bits(load_causal_lm(str(tmp_path), settings, streaming=streaming())), want)

    def not_direct(file, to, at):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return own(file, to, at)

    monkeypatch.setattr(os, "preadv", not_direct)
    assert_equal(bits(load_causal_lm(str(tmp_path), settings, streaming=streaming())), want)


def test_weights_in_a_dtype_that_is_not_known_stay(llama, tmp_path):
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    name = "model.layers.1.mlp.up_proj.weight"
    place = stored_tensors(str(tmp_path))[name]
    with safe_open(place.path, "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, place.path, {"format": "pt"})
    assert load_causal_lm(str(tmp_path)).layers is None
    with pytest.raises(ModelError, match=r"up_proj.weight is stored in a dtype"):
        load_causal_lm(str(tmp_path), streaming=streaming())
