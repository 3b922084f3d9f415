"""llm-rom and the allocations of WeLore and LoRC against naive programs."""

from __future__ import annotations

import bisect
import itertools

import pytest
import torch

import tiny
from planish.calibrate.stream import Stream
from planish.core import Unit
from planish.errors import InputError
from planish.folder.source import MemorySource
from planish.modelling.blocks import get_linear
from planish.request import Limits
from planish.walks.solve import run_solved
from posed import pose_on

WINDOWS = tiny.windows(12, 24)
ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def stream(blocks: int = 4) -> Stream:
    model = tiny.build("llama_gqa", torch.float64, num_hidden_layers=blocks)
    return Stream(MemorySource(model), WINDOWS, dtype=torch.float64)


def weight(s: Stream, unit: Unit) -> torch.Tensor:
    return get_linear(s.source.model.model.layers[unit.block], s.family, unit.name).weight.detach()


@torch.no_grad()
def test_llm_rom_projects_outputs_one_linear_after_the_other():
    """The whole model run anew before every linear; its outputs' principal directions by an SVD of the outputs themselves."""
    s = stream(3)
    job = pose_on(s, "llm-rom", 0.8, settings={"blocks": "2"})
    planned = job.plan()
    assert {u.block for u, r in planned.ranks.items() if r < job.problem.full(u)} == {1, 2}
    model = tiny.build("llama_gqa", torch.float64, num_hidden_layers=3)
    for i, roles in itertools.product((1, 2), (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))):
        seen = {}
        linears = {r: get_linear(model.model.layers[i], s.family, r) for r in roles}
        hooks = [
            x.register_forward_hook(lambda m, a, out, r=r, seen=seen: seen.__setitem__(r, out))
            for r, x in linears.items()
        ]
        model(WINDOWS, use_cache=False)
        for hook in hooks:
            hook.remove()
        for r, linear in linears.items():
            rank = planned.ranks[Unit(i, r)]
            if rank < min(linear.weight.shape):
                v = torch.linalg.svd(seen[r].flatten(0, 1), full_matrices=False)[2][:rank]
                linear.weight.data = v.T @ v @ linear.weight
    (outputs,) = run_solved(job.problem, job.measure, planned, s)
    logits = s.source.model.lm_head(s.source.model.model.norm(outputs))
    torch.testing.assert_close(logits, model(WINDOWS, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_llm_rom_cuts_as_many_blocks_as_the_paper():
    """8, 12 and 24 of 32: here of 16."""
    s = stream(16)
    for keep, cut in ((0.9, 4), (0.8, 6), (0.5, 12)):
        job = pose_on(s, "llm-rom", keep)
        ranks = job.plan().ranks
        assert sorted({u.block for u, r in ranks.items() if r < job.problem.full(u)}) == list(range(16 - cut, 16))
        assert job.left(ranks) >= 0


def test_llm_rom_refuses_blocks_that_cannot_hold_the_cut():
    with pytest.raises(
        InputError, match=r"last 1 of 4 blocks cannot give up 0.5 of all weights: blocks must lie in 3 … 4"
    ):
        pose_on(stream(), "llm-rom", 0.5, settings={"blocks": "1"}).plan()


@pytest.mark.parametrize(("method", "keep"), [("svd", 0.6), ("svd", 0.9), ("svd-llm", 0.6)])
def test_welore_keeps_what_reaches_one_threshold(method, keep):
    """Every threshold tried: that of the plan is one at which nothing more fits but what rounding leaves over."""
    s = stream()
    job = pose_on(s, method, keep, settings={"allocation": "welore"})
    ranks = job.plan().ranks
    scores = {}
    for u in ranks:
        w = weight(s, u)
        if method == "svd-llm":
            x = []
            site = get_linear(s.source.model.model.layers[u.block], s.family, u.name)
            hook = site.register_forward_pre_hook(lambda m, a, x=x: x.append(a[0].detach().flatten(0, 1)))
            s.source.model(WINDOWS, use_cache=False)
            hook.remove()
            w = x[0] @ w.T / len(x[0]) ** 0.5  # has the singular values of W S
        sigma = torch.linalg.svdvals(w)[: min(weight(s, u).shape)]
        scores[u] = (sigma - sigma.min()) / (sigma.max() - sigma.min())

    def at(tau: float) -> dict[Unit, int]:
        made = {}
        for u, x in scores.items():
            out, n = weight(s, u).shape
            r = int((x >= tau).sum())
            made[u] = max(r, 1) if r * (out + n) < out * n else min(out, n)
        return made

    def left(plan: dict[Unit, int]) -> float:
        return job.problem.limits[0] - sum(job.problem.cost(u, r) for u, r in plan.items())

    every = sorted({float(x) for found in scores.values() for x in found})
    first = bisect.bisect_left(every, True, key=lambda t: left(at(t + 1e-7)) >= 0)
    expected = at(every[first] + 1e-7)
    assert left(expected) >= 0 > left(at(every[first - 1] + 1e-7))
    assert left(ranks) >= 0
    raised = {u for u in ranks if ranks[u] != expected[u]}
    assert all(ranks[u] > expected[u] for u in raised)
    assert all(ranks[u] == expected[u] + 1 or ranks[u] == job.problem.full(u) for u in raised)  # a step each at most
    assert left(ranks) <= left(expected) and len({ranks[u] for u in ranks}) > 2


def test_palu_by_condition_numbers():
    s = stream()
    job = pose_on(s, "palu", None, settings={"allocation": "condition", "least": "0.4"}, asked=Limits(kv_keep=0.6))
    planned = job.plan()
    logs = []
    for i in range(4):
        kappas = [torch.linalg.cond(weight(s, Unit(i, r)).T) for r in "kv"]
        logs.append(sum(float(k.log()) for k in kappas))
    sums = [sum(logs[i:]) for i in range(4)]
    expected = [1 - (max(sums) - x) / (max(sums) - min(sums)) * 0.6 for x in sums]
    assert planned.notes["condition"] == pytest.approx(expected, rel=1e-9)
    kept = [planned.ranks[Unit(i, "keys")] for i in range(4)]
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[-1]
