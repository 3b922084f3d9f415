"""The stream sees exactly what the model's own forward computes, one block at a time."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tiny
from planish.apply import apply_edits
from planish.calibrate import losses
from planish.calibrate.activations import MemoryLimits
from planish.calibrate.collect import measure_block
from planish.calibrate.losses import compute_logits, nll
from planish.calibrate.measure import measure_back, sweep_forward
from planish.calibrate.reuse import Reuse
from planish.calibrate.stream import Stream, read_weights
from planish.folder.source import MemorySource, open_source
from planish.methods import find_method
from planish.modelling.blocks import find_blocks, get_linear
from planish.solvers.forms import neuron_edits
from planish.stats import Tap
from planish.walks import solve
from posed import pose_on
from test_resume import hashes
from tiny import compress

WINDOWS = tiny.windows(10, 24)


@torch.no_grad()
@pytest.mark.parametrize("stored", ["memory", "folder"])
@pytest.mark.parametrize("family", tiny.NAMES)
def test_hidden_states_are_the_models_own(family, stored, tmp_path):
    """Every block's input, the last output through norm and head, and the NLL; batches of unequal size."""
    model = tiny.build(family)
    source = MemorySource(model) if stored == "memory" else open_source(tiny.save(model, tmp_path / "m", sharded=True))
    stream = Stream(source, WINDOWS)
    stream.batches = list(WINDOWS.split(4))  # 4, 4, 2
    expected = model(input_ids=WINDOWS, use_cache=False, output_hidden_states=True)
    hidden = stream.start()
    for i in range(len(stream)):
        torch.testing.assert_close(torch.cat(list(hidden)), expected.hidden_states[i], rtol=1e-5, atol=1e-5)
        hidden = stream.run(i, stream.block(i), hidden)
    ours = torch.cat([compute_logits(stream, h) for h in hidden])
    torch.testing.assert_close(ours, expected.logits, rtol=1e-4, atol=1e-4)
    loss = nn.functional.cross_entropy(expected.logits[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten())
    assert nll(stream, hidden) == pytest.approx(float(loss), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.NAMES)
def test_runs_start_reuse(family):
    """A second run with the same q, k, v computes them for the first batch only, with the same o and MLP also gate and up;
    outputs and statistics are the same bits."""
    stream = Stream(MemorySource(tiny.build(family)), WINDOWS)
    stream.batches = list(WINDOWS.split(4))
    hidden, block = stream.start(), stream.block(0)
    runs = dict.fromkeys(("q", "up"), 0)

    def count(role):
        def hook(module, args, out):
            runs[role] += 1

        return hook

    for role in runs:
        get_linear(block, stream.family, role).register_forward_hook(count(role))
    taps = [Tap("o.in", "gram"), Tap("o.out", "gram"), Tap("down.in", "gram"), Tap("attention.add", "gram")]
    reuse = Reuse(stream.limits, len(hidden))
    holds = stream.family.mlp is not None  # a submodule of its own
    for change in (None, None, "o", "down", "up", "q", None):
        if change:
            get_linear(block, stream.family, change).weight.mul_(1.5)
        plain, expected = measure_block(stream, 0, block, taps, hidden)
        runs |= dict.fromkeys(runs, 0)
        stats, outputs = measure_block(stream, 0, block, taps, hidden, reuse=reuse)
        led = {n: s.result is not None for n, s in reuse.starts.items()}
        assert runs == {"q": 1 if led["attention"] else 3, "up": 1 if led["mlp"] else 3}
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        assert all(torch.equal(stats.sums[t]["sum"], plain.sums[t]["sum"]) for t in taps)
        if change == "q":  # the first batch shows that something else came before o
            assert runs["q"] == 3
        if change == "up":
            assert runs["up"] == 3
    assert runs["q"] == 1 and runs["up"] == (1 if holds else 3), "the last run skips again"
    runs |= dict.fromkeys(runs, 0)
    measure_block(
        stream, 0, block, [Tap("k.out", "gram"), Tap("up.out", "gram")], hidden, reuse=reuse
    )  # somebody looks
    assert runs == {"q": 3, "up": 3}
    cases = ((["down"], {"attention", "mlp"}), (["o", "down"], {"attention"}), (["mlp"], {"attention"}), (["q"], set()))
    for solved, led in cases:
        again = Reuse(stream.limits, len(hidden))
        again.enter(["down"])
        stream.run(0, block, hidden, reuse=again)
        again.enter(solved)
        runs |= dict.fromkeys(runs, 0)
        stream.run(0, block, hidden, reuse=again)
        assert runs == {"q": 1 if "attention" in led else 3, "up": 1 if "mlp" in led and holds else 3}


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.CORE)
def test_no_run_starts_where_neurons_were_taken_away(family):
    """What down read before is of no use then: kernels may add up a product of fewer rows in another order."""
    stream = Stream(MemorySource(tiny.build(family)), WINDOWS)
    stream.batches = list(WINDOWS.split(4))
    hidden, shape, runs = stream.start(), stream.source.shape(0), []
    reuse = Reuse(stream.limits, len(hidden))
    stream.run(0, stream.block(0), hidden, reuse=reuse.enter(["down"]))
    measure_block(
        stream, 0, stream.block(0), [Tap("down.in", "gram")], hidden, outputs=False, reuse=reuse.enter(["mlp"])
    )
    kept = torch.arange(1, shape.intermediate, 2)
    block = stream.block(0)
    edits = neuron_edits(read_weights(block, stream), kept, torch.randn(shape.hidden, len(kept)))
    apply_edits(block, edits, stream.family, stream.source.config, shape)
    expected = stream.run(0, block, hidden)
    get_linear(block, stream.family, "up").register_forward_hook(lambda m, args, out: runs.append(len(out)))
    outputs = stream.run(0, block, hidden, reuse=reuse.enter())
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert len(runs) == 3


@torch.no_grad()
def test_what_down_reads_is_kept_where_it_fits_twice():
    stream = Stream(MemorySource(tiny.build(tiny.CORE[0])), WINDOWS)
    stream.batches = list(WINDOWS.split(4))
    hidden, block = stream.start(), stream.block(0)
    size = 4 * WINDOWS.numel() * stream.source.shape(0).width("down.in")  # the last batch is smaller than counted
    for limit, kept in ((4 * size, True), (size, False)):
        reuse = Reuse(MemoryLimits(limit), len(hidden))
        expected = stream.run(0, block, hidden)
        for _ in range(2):
            outputs = stream.run(0, block, hidden, reuse=reuse)
            assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        assert (reuse.starts["mlp"].kept is not None) == kept
        assert reuse.starts["attention"].kept is not None


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.CORE)
def test_taps_measure_what_hooks_see(family):
    """Sites against plain hooks on the stock modules of the whole model."""
    model = tiny.build(family)
    stream = Stream(MemorySource(model), WINDOWS)
    row, i = stream.family, 1
    block = find_blocks(model, row)[i]
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(module, args, kwargs, out):
            seen[f"{name}.in"] = args[0] if args else kwargs["hidden_states"]
            seen[f"{name}.out"] = out[0] if isinstance(out, tuple) else out

        return hook

    paths = {"block": "", "o": row.linears["o"], "down": row.linears["down"], "norm": row.attention_norm}
    paths["mlp_norm"] = row.mlp_norm
    paths |= {"post": row.attention_post_norm or row.attention}
    handles = [block.get_submodule(p).register_forward_hook(keep(n), with_kwargs=True) for n, p in paths.items()]
    model(input_ids=WINDOWS, use_cache=False)
    for handle in handles:
        handle.remove()
    sites = {
        "block.in": seen["block.in"], "block.out": seen["block.out"], "o.in": seen["o.in"], "down.in": seen["down.in"],
        "q.in": seen["norm.out"], "up.in": seen["mlp_norm.out"], "attention.raw": seen["norm.in"],
        "mlp.raw": seen["mlp_norm.in"], "attention.add": seen["post.out"], "down.out": seen["down.out"],
    }  # fmt: skip
    taps = [Tap(s, "gram") for s in sites]
    found = {j: s for j, _, s in sweep_forward(stream, lambda shape: taps if shape.block == i else [])}
    for site, x in sites.items():
        x = x.flatten(0, -2).double()
        torch.testing.assert_close(found[i].sums[Tap(site, "gram")]["sum"], x.T @ x, rtol=1e-4, atol=1e-4, msg=site)
        assert found[i].tokens[Tap(site, "gram")] == WINDOWS.numel()


@torch.no_grad()
def test_parts_split_the_windows():
    stream = Stream(MemorySource(tiny.build("llama_gqa")), tiny.windows(17, 24))
    stream.batches = list(tiny.windows(17, 24).split(5))
    taps = [Tap("block.in", "gram", part=p) for p in ("all", "fit", "held")]
    stats, _ = measure_block(stream, 0, stream.block(0), taps, stream.start())
    assert [stats.tokens[t] // 24 for t in taps] == [17, 15, 2]
    all_, fit, held = (stats.sums[t]["sum"] for t in taps)
    torch.testing.assert_close(fit + held, all_)
    x = tiny.build("llama_gqa").get_input_embeddings()(tiny.windows(17, 24)[7::8]).flatten(0, 1).double()
    torch.testing.assert_close(held, x.T @ x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["svd-llm", "flat-llm", "a3"])
def test_few_blocks_are_alive_at_once(method, tmp_path):
    """Whatever the number of blocks: the one being solved, its pristine copy and the one being written."""
    model = tiny.build("llama_gqa", num_hidden_layers=7)
    source = open_source(tiny.save(model, tmp_path / "m"))
    stream = Stream(source, WINDOWS)
    alive: list[weakref.ref] = []
    peak = 0
    read = source.block

    def block(i: int, **how) -> nn.Module:
        nonlocal peak
        module = read(i, **how)
        alive.append(weakref.ref(module))
        peak = max(peak, sum(ref() is not None for ref in alive))
        return module

    source.block = block
    job = pose_on(stream, find_method(method), 0.7)
    solve.solve(job.problem, job.measure, job.plan(), lambda *block: None)
    assert len(alive) >= 7 and peak <= 2
    assert all(p.is_meta for b in stream.blocks for p in b.parameters())


def test_nothing_is_left_behind():
    model = tiny.build("gemma2")
    before = {n: sorted(vars(m)) for n, m in model.named_modules()}
    stream = Stream(MemorySource(model), WINDOWS)
    hidden = stream.start()
    measure_block(stream, 0, stream.block(0), [Tap("o.in", "gram"), Tap("attention.add", "squares")], hidden)
    assert {n: sorted(vars(m)) for n, m in model.named_modules()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("forward" in vars(b) for b in stream.blocks)


@pytest.mark.parametrize("name", ["llama_gqa", "opt", "gemma2", "gpt_neox"])
def test_the_head_in_pieces(name, monkeypatch):
    """A vocabulary too large for a batch's logits changes neither losses nor gradients, and no more is asked of the head."""
    windows = tiny.windows(5, 24)
    s = Stream(MemorySource(tiny.build(name, torch.float64)), windows, dtype=torch.float64)
    outputs = s.outputs()
    inputs = s.start()
    whole = losses.nll(s, outputs), losses.divergence(s, inputs, outputs), losses.output_gradient(s, outputs[0], 0, 0)
    sizes = []
    old = losses.as_embeddings

    def embedded(stream, hidden):
        sizes.append(hidden.shape[:-1].numel())
        return old(stream, hidden)

    monkeypatch.setattr(losses, "as_embeddings", embedded)
    monkeypatch.setattr(losses, "LOGITS", 7 * s.source.config.vocab_size + 1)
    assert losses.nll(s, outputs) == pytest.approx(whole[0], rel=1e-13)
    assert losses.divergence(s, inputs, outputs) == pytest.approx(whole[1], rel=1e-12)
    torch.testing.assert_close(losses.output_gradient(s, outputs[0], 0, 0), whole[2], rtol=1e-10, atol=1e-13)
    assert max(sizes) == 7


@pytest.mark.parametrize("units", ["any", "structural", "linear"])
def test_uncompressed_block_may_run_again(units, tmp_path, monkeypatch):
    """What accelerators do instead of keeping what it showed: the same bytes are written."""
    model, kept = tiny.build("llama_gqa"), list[set[str]]()

    def look(*args, sites=solve.find_dense_sites):
        kept.append(sites(*args))
        return kept[-1]

    monkeypatch.setattr("planish.walks.solve.find_dense_sites", look)
    compress(model, output=tmp_path / "kept", method="auto", keep=0.7, windows=WINDOWS, settings={"units": units})
    assert all(kept[-3:])
    monkeypatch.setattr("planish.walks.solve.find_dense_sites", lambda *args: set())
    compress(model, output=tmp_path / "again", method="auto", keep=0.7, windows=WINDOWS, settings={"units": units})
    assert hashes(tmp_path / "kept") == hashes(tmp_path / "again")


@pytest.mark.parametrize("family", ["llama_gqa", "phi3"])
def test_coarse_products_change_statistics_by_their_rounding_only(family):
    """Products in bf16, all else in fp32: Grams and gradients' moments as in fp32, within what bf16 rounds."""
    stream = Stream(MemorySource(tiny.build(family)), tiny.windows(9, 24))
    coarse, hidden = stream.part(tiny.windows(9, 24), torch.bfloat16), stream.start()
    coarse.start()
    into = [torch.randn_like(h) for h in hidden]
    taps = [Tap("down.in", "gram"), Tap("grad:o.out", "gram"), Tap("grad:up.back", "gram")]
    found = [measure_back(s, 0, s.block(0), taps, (hidden, into)) for s in (stream, coarse)]
    for tap in taps:
        exact, other = (stats.mean(tap) for stats, _ in found)
        assert 0 < (other - exact).norm() < 0.02 * exact.norm(), tap
    assert all(g.dtype == torch.float32 for _, gradients in found for g in gradients)
    assert all(h.dtype == torch.float32 for h in coarse.run(0, coarse.block(0), hidden))


@given(words=st.integers(1, 700), seed=st.integers(0, 99), peak=st.sampled_from([0.0, 8.0, 60.0]))
@settings(deadline=None, max_examples=25)
def test_labels_are_drawn_by_the_whole_sum(words, seed, peak):
    """As searching all sums of probabilities would, one by one."""
    generator = torch.Generator().manual_seed(seed)
    p = (torch.randn(6, words, generator=generator) * (1 + peak)).softmax(-1)
    noise = torch.rand(6, generator=generator, dtype=torch.float64)
    noise[0] = 0
    found = losses.draw_labels(p, noise)
    for row, aim, label in zip(p.double(), noise, found.tolist(), strict=True):
        total = row.sum() * aim
        assert row[:label].sum() <= total + 1e-6 and row[: label + 1].sum() >= total - 1e-6
        assert aim == 0 or row[label] > 0
