"""The store: values against Hugging Face and TransformerLens, and everything that can break it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_cli import run
from tiny_models import D_VOCAB, N_LAYERS, random_tokens, shared_model, tiny_model

from mechinterp.checkpoints import save_checkpoint
from mechinterp.errors import SiteError, StoreError
from mechinterp.hooked import HookedModel
from mechinterp.store import capture, open_store, writing
from mechinterp.store.command import parse_layers, parse_positions
from mechinterp.store.moments import Moments
from mechinterp.store.tensor_file import TensorFile
from mechinterp.tasks import get

N, LENGTH = 20, 7
TOKENS = random_tokens(N, LENGTH)
SMALL = {"shard_bytes": 3_000, "batch_size": 4}  # several shards of several batches


@pytest.fixture
def out(tmp_path):
    return tmp_path / "store"


def hidden_states(model, tokens):
    with torch.no_grad():
        return model.model(tokens, output_hidden_states=True).hidden_states


def hashes(out):
    return {path.name: path.read_bytes() for path in out.glob("shard-*")}


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_residuals_are_those_of_hugging_face(out, dtype):
    model = shared_model("llama")
    store = capture(model, TOKENS, sites=["resid_pre", "resid_post"], out=out, dtype=dtype, **SMALL)
    theirs = hidden_states(model, TOKENS)  # the last of them is after the final norm
    assert store.plan.n_shards > 2
    for layer in range(N_LAYERS):
        expected = theirs[layer][:, -1].to(getattr(torch, dtype))
        torch.testing.assert_close(store.layer("resid_pre", layer), expected)
        if layer > 0:
            torch.testing.assert_close(store.layer("resid_post", layer - 1), expected)
    normed = model.final_norm(store[f"resid_post.{N_LAYERS - 1}"].float())
    tolerance = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-1}[dtype]
    torch.testing.assert_close(normed, theirs[-1][:, -1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_every_site_is_that_of_transformer_lens(out, family):
    model = shared_model(family)
    grains = ["resid_pre", "q", "k", "v", "pattern", "head", "attn_out"]
    grains += ["neuron", "mlp_out", "resid_post", *([] if family == "gpt_neox" else ["resid_mid"])]
    store = capture(model, TOKENS, sites=grains, positions="all", out=out, batch_size=6)
    _, cache = model.bridge().run_with_cache(TOKENS)
    for site in store:
        theirs = cache[site.transformer_lens_name]
        if site.grain == "pattern":
            theirs = theirs.transpose(1, 2)
        torch.testing.assert_close(
            store[site], theirs.reshape(store[site].shape), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("positions", ["decision", "last", "all", 2, -2, [0, 3, -1]])
@pytest.mark.parametrize("site", ["resid_post.1", "head.1.2", "pattern.1", "pattern.1.0"])
def test_positions_are_those_of_capture(out, positions, site):
    model = shared_model("llama")
    plain = {"decision": -1, "last": -1, "all": None}
    at = positions if isinstance(positions, list | int) else plain[positions]
    expected = model.capture(TOKENS, site, positions=at)[site]
    if site == "pattern.1" and expected.ndim == 4:
        expected = expected.transpose(1, 2)
    store = capture(model, TOKENS, sites=site, positions=positions, out=out, batch_size=6)
    torch.testing.assert_close(store[site], expected)


def test_one_position_per_item(out):
    at = torch.arange(N) % LENGTH
    model = shared_model("llama")
    store = capture(model, TOKENS, positions=at, out=out, **SMALL)
    expected = model.capture(TOKENS, "resid_post.2", positions=at)["resid_post.2"]
    torch.testing.assert_close(store["resid_post.2"], expected)


def padded(items, side):
    width = max(map(len, items))
    tokens, mask = torch.zeros(len(items), width, dtype=torch.long), torch.zeros(len(items), width)
    for row, ids in enumerate(items):
        columns = slice(0, len(ids)) if side == "right" else slice(width - len(ids), None)
        tokens[row, columns] = torch.tensor(ids)
        mask[row, columns] = 1
    return tokens, mask.long()


@settings(max_examples=15, deadline=None)
@given(
    items=st.lists(
        st.lists(st.integers(0, D_VOCAB - 1), min_size=3, max_size=9), min_size=1, max_size=7
    ),
    positions=st.sampled_from(["decision", "all", 1, [0, -1], [-2, 0]]),
    family=st.sampled_from(["llama", "gpt2", "gemma2"]),
    site=st.sampled_from(["resid_post.1", "pattern.1", "head.1"]),
)
def test_padding_on_either_side_gives_each_item_alone(
    tmp_path_factory, items, positions, family, site
):
    model = shared_model(family)
    stores = []
    for side in ("left", "right", "ragged"):
        out = tmp_path_factory.mktemp("padded") / side
        tokens, mask = (items, None) if side == "ragged" else padded(items, side)
        options = {"positions": positions, "attention_mask": mask, "batch_size": 3}
        stores.append(capture(model, tokens, sites=site, out=out, **options))
    left, right, ragged = (store[site] for store in stores)
    assert stores[0].plan.key == stores[1].plan.key == stores[2].plan.key
    assert torch.equal(left, right)
    assert torch.equal(left, ragged)
    assert stores[0].lengths.tolist() == [len(ids) for ids in items]
    for row, ids in enumerate(items):
        at = {"decision": -1, "all": None}.get(str(positions), positions)
        alone = model.capture(torch.tensor([ids]), site, positions=at)[site]
        if site == "pattern.1" and alone.ndim == 4:
            alone = alone.transpose(1, 2)
        found = left[row]
        if positions == "all":
            assert not found[len(ids) :].any()
            found = found[: len(ids)]
        if site == "pattern.1":
            found = found[..., : len(ids)]
        torch.testing.assert_close(found, alone[0], atol=1e-5, rtol=1e-5)


def test_batch_size_changes_at_most_the_last_digits(out, tmp_path):
    model = shared_model("llama")
    first = capture(model, TOKENS, out=out, batch_size=1)
    second = capture(model, TOKENS, out=tmp_path / "other", batch_size=7)
    assert first.plan.key == second.plan.key
    for site in first:
        torch.testing.assert_close(first[site], second[site], atol=1e-5, rtol=1e-5)


def test_layers_and_single_heads(out):
    store = capture(
        shared_model("llama"), TOKENS, sites=["resid_post", "head.0.3"], layers=[1, 2], out=out
    )
    assert [str(site) for site in store] == ["head.0.3", "resid_post.1", "resid_post.2"]
    assert [layer for layer, _ in store.layers("resid_post")] == [1, 2]


def test_nothing_runs_after_the_last_layer_that_is_needed(out):
    model = HookedModel(tiny_model("llama"))
    ran = []
    for block in model.architecture.blocks:
        block.module.register_forward_hook(lambda *_, layer=block.layer: ran.append(layer))
    model.model.lm_head.register_forward_hook(lambda *_: ran.append("unembedding"))
    capture(model, TOKENS, layers=[0, 1], out=out)
    assert set(ran) == {0, 1}


# ---- reading -------------------------------------------------------------------------------------


def test_reading_maps_the_file_and_leaves_it_alone(out):
    store = capture(shared_model("llama"), TOKENS, out=out)
    first, second = store["resid_post.1"], store["resid_post.1"]
    expected = second.clone()
    assert first.data_ptr() != second.data_ptr()
    assert "memmap" in mapped_by(out)
    first.zero_()  # of this copy alone
    assert torch.equal(store["resid_post.1"], expected)


def mapped_by(out):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc to look at")
    return "memmap" if str(out) in maps.read_text() else ""


def test_shards_are_plain_safetensors(out):
    store = capture(shared_model("llama"), TOKENS, out=out, **SMALL)
    parts = [load_file(path) for path in sorted(out.glob("shard-*"))]
    for site in store:
        assert torch.equal(torch.cat([part[str(site)] for part in parts]), store[site])
        assert torch.equal(torch.cat(list(store.chunks(site))), store[site])
    assert torch.equal(store.tokens, TOKENS)
    # Each site's items lie together: reading one layer reads one stretch of each file.
    for shard in store.plan.shards:
        ends = [end for _, end in shard.offsets.values()]
        assert [begin for begin, _ in shard.offsets.values()] == [0, *ends[:-1]]


def test_a_site_that_is_not_there_is_named(out):
    store = capture(shared_model("llama"), TOKENS, layers=[1], out=out)
    with pytest.raises(SiteError, match=r"resid_post\.2 is not in this store, which has resid_po"):
        store["resid_post.2"]
    with pytest.raises(SiteError, match="head is not in this store"):
        store.layers("head")


# ---- statistics ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    shift=st.sampled_from([0.0, 1.0, 1e8]),
    whole=st.booleans(),
)
def test_moments_are_those_of_numpy(sizes, shift, whole):
    rng = np.random.default_rng(sum(sizes))
    rows = rng.normal(size=(sum(sizes) + 2, 3)) + shift
    moments = Moments(3, covariance=whole)
    for part in np.split(rows, np.cumsum([2, *sizes])[:-1]):
        moments.update(torch.from_numpy(part))
    expected = np.cov(rows.T)
    assert moments.count == len(rows)
    # At 1e8 the rows themselves have 1e-8 left, so their squares would have no digit at all.
    tolerance = 1e-6 if shift > 1 else 1e-12
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance, expected.diagonal(), rtol=tolerance)
    if whole:
        np.testing.assert_allclose(moments.covariance, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("positions", ["decision", "all", [0, -1]])
def test_statistics_are_those_of_what_is_stored(out, positions):
    items = [ids[: 3 + row % 5].tolist() for row, ids in enumerate(TOKENS.repeat(4, 1))]
    store = capture(
        shared_model("llama"), items, sites=["resid_post", "head"], positions=positions, out=out,
        dtype="float16", **SMALL,
    )  # fmt: skip
    for site in store:
        rows = store[site].double()
        if positions == "all":
            rows = torch.cat([row[:n] for row, n in zip(rows, store.lengths, strict=True)])
        elif positions != "decision":
            rows = rows.flatten(0, 1)
        found, rows = store.statistics(site), rows.flatten(1).numpy()
        assert found.count == len(rows)
        np.testing.assert_allclose(found.mean.flatten(), rows.mean(0), atol=1e-12)
        np.testing.assert_allclose(found.variance.flatten(), rows.var(0, ddof=1), atol=1e-12)
        np.testing.assert_allclose(found.covariance, np.cov(rows.T), atol=1e-12)


def test_covariance_is_kept_where_it_is_asked_for_and_has_rank(out):
    model, sites = shared_model("llama"), ["resid_post.1", "neuron.1"]
    few = capture(model, TOKENS, sites=sites, out=out)
    assert few.statistics("resid_post.1").covariance is None  # 20 rows of 32 numbers
    many = capture(model, TOKENS, sites=sites, positions="all", out=out / "b", covariance_width=40)
    assert many.statistics("resid_post.1").covariance is not None
    assert many.statistics("neuron.1").covariance is None  # 48 wide
    more = capture(model, TOKENS, sites=sites, positions="all", out=out / "b", covariance_width=48)
    assert more.statistics("neuron.1").covariance is not None


# ---- going on ------------------------------------------------------------------------------------


def count_items(model, monkeypatch):
    """How many items are run from now on; the probing token that finds shapes is not one."""
    ran, original = [], model.capture

    def counting(tokens, *arguments, **options):
        ran.extend([1] * len(tokens) if tokens.shape[1] > 1 else [])
        return original(tokens, *arguments, **options)

    monkeypatch.setattr(model, "capture", counting)
    return ran


def test_a_finished_store_runs_nothing_again(out, monkeypatch):
    model = HookedModel(tiny_model("llama"))
    capture(model, TOKENS, out=out, **SMALL)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    ran = count_items(model, monkeypatch)
    capture(model, TOKENS, out=out)  # another batch size and shard size: the same content
    assert not ran
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_store_goes_on(out, tmp_path, monkeypatch, error):
    whole = capture(shared_model("llama"), TOKENS, out=tmp_path / "whole", **SMALL)
    model = HookedModel(tiny_model("llama"))
    with monkeypatch.context() as patch:
        original, runs = writing._run, []

        def stop(*arguments):
            runs.append(1)
            if len(runs) == 5:
                raise error
            original(*arguments)

        patch.setattr(writing, "_run", stop)
        with pytest.raises(error):
            capture(model, TOKENS, out=out, **SMALL)
    n_done = len(list(out.glob("shard-*")))
    assert 0 < n_done < whole.plan.n_shards
    assert not list(out.glob(".*"))
    with pytest.raises(StoreError, match=f"is not finished .{n_done} of {whole.plan.n_shards} sh"):
        open_store(out)
    ran = count_items(model, monkeypatch)
    capture(model, TOKENS, out=out, **SMALL)
    assert len(ran) == N - n_done * whole.plan.items_per_shard
    for name in ("store.json", "statistics.safetensors", *hashes(out)):
        assert (out / name).read_bytes() == (whole.path / name).read_bytes()


KILLED = """
import sys, time, torch
torch.set_num_threads(1)
from mechinterp.hooked import HookedModel
from mechinterp.store import capture, writing
original = writing._run
def slowly(*arguments):
    time.sleep(0.2)
    original(*arguments)
writing._run = slowly
model = HookedModel.from_checkpoint(sys.argv[1])
tokens = torch.arange(400).reshape(80, 5) % 64
capture(model, tokens, out=sys.argv[2], shard_bytes=3000, batch_size=4)
"""


def test_a_killed_store_goes_on_without_redoing_finished_shards(out, tmp_path, monkeypatch):
    """SIGKILL, so that nothing can be tidied up."""
    save_checkpoint(tiny_model("llama"), tmp_path / "checkpoint")
    process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "checkpoint", out])
    deadline = time.monotonic() + 120
    while not (out / "shard-00001.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    while not list(out.glob(".shard-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(out.glob(".shard-*")), "it was to be killed while it wrote a shard"
    finished = {path: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    model = HookedModel.from_checkpoint(tmp_path / "checkpoint")
    ran = count_items(model, monkeypatch)
    tokens = torch.arange(400).reshape(80, 5) % D_VOCAB
    store = capture(model, tokens, out=out)  # its shards keep the size that they had
    assert 2 <= len(finished) < store.plan.n_shards
    assert len(ran) == 80 - len(finished) * store.plan.items_per_shard
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    assert not list(out.glob(".*"))
    expected = hidden_states(model, tokens)
    torch.testing.assert_close(store["resid_post.0"], expected[1][:, -1])


# ---- damage --------------------------------------------------------------------------------------


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def stored(out):
    return capture(shared_model("llama"), TOKENS, out=out, **SMALL)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path_factory, data):
    model = shared_model("llama")
    out = tmp_path_factory.mktemp("flip") / "store"
    capture(model, TOKENS, out=out, layers=[1], **SMALL)
    path = data.draw(st.sampled_from(sorted(out.iterdir())))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(StoreError) as caught:
        open_store(out).verify()
    assert str(path) in one_line(caught)
    with pytest.raises(StoreError) as caught:
        capture(model, TOKENS, out=out, layers=[1])
    assert str(path) in one_line(caught)


def test_a_flipped_byte_is_found_when_its_site_is_read(stored, out):
    shard = stored.plan.shards[1]
    begin = len(shard.path.read_bytes()) - 1  # of the last site
    with open(shard.path, "r+b") as file:
        file.seek(begin)
        byte = file.read(1)
        file.seek(begin)
        file.write(bytes([byte[0] ^ 1]))
    store = open_store(out)
    assert store["resid_post.1"].isfinite().all()  # the other sites are whole
    with pytest.raises(StoreError) as caught:
        store["resid_post.2"]
    assert one_line(caught) == (
        f"{shard.path}: resid_post.2: its bytes are not those that were written; delete "
        f"{shard.path} and give the same capture again: only it is redone"
    )
    open_store(out, verify=False)["resid_post.2"]
    with pytest.raises(StoreError, match=r"resid_post\.2: its bytes"):
        capture(shared_model("llama"), TOKENS, out=out)
    stored.plan.shards[0].path.unlink()  # and where it goes on from it
    with pytest.raises(StoreError, match=r"resid_post\.2: its bytes"):
        capture(shared_model("llama"), TOKENS, out=out)


def test_the_remedy_for_a_damaged_shard_mends_it(stored, out, monkeypatch):
    before = hashes(out)
    (out / "shard-00001.safetensors").unlink()
    ran = count_items(model := HookedModel(tiny_model("llama")), monkeypatch)
    capture(model, TOKENS, out=out, **SMALL)
    assert len(ran) == stored.plan.items_per_shard
    assert hashes(out) == before


def test_a_truncated_shard_is_named(stored, out):
    shard = stored.plan.shards[2]
    os.truncate(shard.path, shard.n_bytes - 5)
    for attempt in (
        lambda: open_store(out),
        lambda: capture(shared_model("llama"), TOKENS, out=out),
    ):
        with pytest.raises(StoreError) as caught:
            attempt()
        message = one_line(caught)
        assert message.startswith(f"{shard.path}: is truncated ({shard.n_bytes - 5:,} of ")
        assert "only it is redone" in message


def test_a_shard_of_another_store_is_not_taken_for_ours(stored, out, tmp_path):
    other = capture(shared_model("llama"), (TOKENS + 1) % D_VOCAB, out=tmp_path / "b", **SMALL)
    shutil.copy(other.plan.shards[0].path, stored.plan.shards[0].path)
    with pytest.raises(StoreError, match=r"shard-00000.*its header is not the one"):
        open_store(out)


def test_a_damaged_description_is_named(stored, out):
    about = out / "store.json"
    about.write_text(about.read_text().replace('"n_items": 20', '"n_items": 21'))
    with pytest.raises(StoreError, match=r"store\.json: is not what was written; delete"):
        open_store(out)
    about.unlink()
    with pytest.raises(StoreError, match=r"it has no store\.json"):
        open_store(out)
    with pytest.raises(StoreError, match="holds files but no store"):
        capture(shared_model("llama"), TOKENS, out=out)


def test_a_store_of_something_else_is_named(stored, out, tmp_path):
    def refused(field, model=None, tokens=TOKENS, **options):
        with pytest.raises(StoreError) as caught:
            capture(model or shared_model("llama"), tokens, out=out, **options)
        message = one_line(caught)
        assert message.startswith(f"{out / 'store.json'}: {field}: this is a store of ")
        assert message.endswith(f"give another --out, or delete {out}")

    before = hashes(out)
    refused("checkpoint", HookedModel(tiny_model("llama", seed=1)))
    refused("items", tokens=(TOKENS + 1) % D_VOCAB)
    refused("items", tokens=TOKENS[:-1])
    refused("dtype", dtype="bfloat16")
    refused("sites", sites="resid_pre")
    refused("sites", layers=[0])
    refused("positions", positions="all")
    refused("positions", positions=[-1])
    assert hashes(out) == before


def test_a_store_computed_in_another_dtype_is_named(out, tmp_path):
    path = save_checkpoint(tiny_model("llama"), tmp_path / "checkpoint").path
    capture(HookedModel.from_checkpoint(path), TOKENS, out=out, dtype="bfloat16")
    half = HookedModel.from_checkpoint(path, dtype="bfloat16")
    with pytest.raises(StoreError, match="computed_in: this is a store of float32, not of bfloat"):
        capture(half, TOKENS, out=out, dtype="bfloat16")


def test_the_key_knows_no_place(stored, tmp_path):
    """Content alone: moved, and from a checkpoint saved again elsewhere."""
    moved = shutil.copytree(stored.path, tmp_path / "moved")
    assert open_store(moved).plan.key == stored.plan.key
    paths = [save_checkpoint(tiny_model("llama"), tmp_path / name).path for name in ("a", "b")]
    first, second = (
        capture(HookedModel.from_checkpoint(path), TOKENS, out=path / "store") for path in paths
    )
    assert first.plan.key == second.plan.key
    assert (first.path / "store.json").read_bytes() == (second.path / "store.json").read_bytes()


# ---- disk and values -----------------------------------------------------------------------------


def test_too_little_space_is_found_before_anything_is_run(out, monkeypatch):
    model = HookedModel(tiny_model("llama"))
    ran = count_items(model, monkeypatch)
    usage = shutil.disk_usage(out.parent)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match=r"needs 0\.0 MB and the disk has 0\.0 MB free; free some"):
        capture(model, TOKENS, out=out)
    assert not ran
    assert not out.exists()


@pytest.mark.parametrize("step", ["reserve", "write", "seal"])
def test_a_disk_that_fills_up_is_named_and_the_store_goes_on(out, monkeypatch, step):
    model = shared_model("llama")
    with monkeypatch.context() as patch:
        original, calls = getattr(TensorFile, step), []

        def full(file, *arguments):
            calls.append(1)
            if file.path.name.startswith(".shard-00002"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(file, *arguments)

        patch.setattr(TensorFile, step, full)
        with pytest.raises(StoreError) as caught:
            capture(model, TOKENS, out=out, **SMALL)
    message = one_line(caught)
    assert message.startswith(f"{out / 'shard-00002.safetensors'}: the disk is full")
    assert "finished shards are kept" in message
    assert sorted(hashes(out)) == ["shard-00000.safetensors", "shard-00001.safetensors"]
    assert not list(out.glob(".*"))
    assert capture(model, TOKENS, out=out).n_items == N


def test_another_error_of_the_disk_is_not_called_full(out, monkeypatch):
    def broken(file):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(TensorFile, "reserve", broken)
    with pytest.raises(OSError, match="Input/output"):
        capture(shared_model("llama"), TOKENS, out=out)


def test_values_that_do_not_fit_are_named(out):
    raw = tiny_model("llama")
    with torch.no_grad():
        raw.model.layers[1].mlp.down_proj.weight.mul_(1e6)
    model = HookedModel(raw, self_test=False)
    with pytest.raises(StoreError, match=r"resid_post\.1, items 0 to 19: .* not fit float16; use"):
        capture(model, TOKENS, out=out, dtype="float16")
    # Nothing was stored, so the remedy works in the same place.
    assert capture(model, TOKENS, out=out, dtype="bfloat16").n_items == N


def test_a_network_with_nan_is_named(tmp_path):
    raw = tiny_model("llama")
    with torch.no_grad():
        raw.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(StoreError, match=r"resid_post\.1, .* own activations are not finite"):
        capture(HookedModel(raw, self_test=False), TOKENS, out=tmp_path / "store")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "middle"}, "positions: 'middle' is unknown"),
        ({"positions": 7}, "positions: item 0 has 7 tokens, too few for [7]"),
        ({"positions": [6, -1]}, "item 0 has 7 tokens, one of them named twice by [6, 6]"),
        ({"positions": []}, "positions: none is given"),
        ({"positions": torch.zeros(3).long()}, "one position per item"),
        ({"dtype": "float64"}, "dtype: float64 cannot be stored"),
        ({"attention_mask": torch.ones(2, 2)}, "attention_mask: shape (2, 2)"),
        ({"attention_mask": torch.zeros(N, LENGTH)}, "items: there is none, or one without tokens"),
        ({"sites": []}, "sites: none is given"),
        ({"sites": "resid"}, "did you mean resid_pre"),
        ({"layers": [3]}, "this network has layers 0 to 2"),
    ],
)
def test_bad_options_leave_nothing(out, options, message):
    with pytest.raises((StoreError, SiteError)) as caught:
        capture(shared_model("llama"), TOKENS, out=out, **options)
    assert message in one_line(caught)
    assert not out.exists()


# ---- the command ---------------------------------------------------------------------------------

TASK = {"linear": [1.5], "xor": [2.0], "n_fillers": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from mechinterp.training.config import ModelConfig
    from mechinterp.training.organism import initial_model

    config = ModelConfig(n_layers=2, d_model=16, n_heads=2, n_kv_heads=2, d_mlp=16)
    directory = tmp_path_factory.mktemp("command")
    save_checkpoint(initial_model(config, get("triage", **TASK), seed=0), directory / "checkpoint")
    (directory / "task.yaml").write_text(
        "task: triage\nsettings: {linear: [1.5], xor: [2.0], n_fillers: 1}\n"
    )
    return directory


def test_the_command(capsys, checkpoint, out):
    arguments = ("capture", checkpoint / "checkpoint", "--task", checkpoint / "task.yaml")
    options = ("--sites", "resid_post,head", "--items", 12, "--positions", "0,-1", "--layers", "1")
    status, printed, _ = run(capsys, *arguments, *options, "--dtype", "bfloat16", "--out", out)
    assert status == 0
    assert "[12 2 2 8] bfloat16" in printed
    store = open_store(out)
    items = get("triage", **TASK).sample(12)
    assert torch.equal(store.tokens, items.tokens)
    model = HookedModel.from_checkpoint(checkpoint / "checkpoint")
    expected = model.capture(items.tokens, "head.1", positions=[0, -1])["head.1"]
    torch.testing.assert_close(store.layer("head", 1).float(), expected, atol=1e-2, rtol=1e-2)
    assert run(capsys, *arguments, *options, "--dtype", "bfloat16", "--out", out)[0] == 0
    for wrong, message in (
        (("--dtype", "float32"), "dtype: this is a store of bfloat16, not of float32"),
        (("--dtype", "bfloat16", "--seed", 1), "items: this is a store of"),
        (("--layers", "1-"), "--layers 1-: expected numbers and ranges"),
        (("--positions", "end"), "positions: 'end' is unknown"),
    ):
        status, _, err = run(capsys, *arguments, *options, *wrong, "--out", out)
        assert (status, err.count("\n")) == (2, 1)
        assert message in err


def test_lists_as_the_command_writes_them():
    assert parse_layers("0-2,5") == [0, 1, 2, 5]
    assert parse_positions("0, -1") == [0, -1]
    assert parse_positions("-1") == [-1]
    assert parse_positions("decision") == "decision"


PEAK = """
import resource, sys, torch
torch.set_num_threads(1)
from mechinterp.hooked import HookedModel
from mechinterp.store import capture
model = HookedModel.from_checkpoint(sys.argv[1])
tokens = torch.randint(64, (int(sys.argv[3]), 8), generator=torch.Generator().manual_seed(0))
store = capture(model, tokens, out=sys.argv[2], positions="all")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_items(out, tmp_path):
    save_checkpoint(tiny_model("llama"), tmp_path / "checkpoint")

    def peak(n):
        command = [sys.executable, "-c", PEAK, tmp_path / "checkpoint", out / str(n), str(n)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    growth = peak(16_000) - peak(1_600)
    size = sum(path.stat().st_size for path in (out / "16000").iterdir()) / 2**20
    assert size > 40
    assert growth < 0.15 * size  # the tokens, which are the caller's, are 1 MB
