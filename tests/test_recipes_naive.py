"""Whole recipes against the papers' procedures written out naively: hooks, Cholesky, explicit inverses, masks in place of
smaller shapes. Nothing of planish's mathematics is used; the models' logits must agree."""

from __future__ import annotations

import copy
import json
from collections import Counter
from math import pi
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tiny
from planish.solvers.linear import TwoStageSVD
from tiny import compress, load

WINDOWS, TEST = tiny.windows(24, 24), tiny.windows(4, 24, seed=9)
ROLES = {r: f"self_attn.{r}_proj" for r in "qkvo"} | {r: f"mlp.{r}_proj" for r in ("gate", "up", "down")}
HEADS, GROUPS = 4, 2


def build(family: str) -> nn.Module:
    return tiny.build(family, torch.float64, num_hidden_layers=4)


@torch.no_grad()
def capture(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, tuple[Tensor, Tensor]]:
    """Every module's inputs and outputs (tokens, width) over the calibration windows."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    flat = lambda t: (t[0] if isinstance(t, tuple) else t).flatten(0, 1)  # noqa: E731
    hooks = [
        m.register_forward_hook(lambda _, x, y, n=n: found.__setitem__(n, (flat(x), flat(y))))
        for n, m in modules.items()
    ]
    model(WINDOWS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def linears(model: nn.Module, i: int) -> dict[str, nn.Module]:
    return {r: model.model.layers[i].get_submodule(path) for r, path in ROLES.items()}


def run(model: nn.Module, output: Path, method: str, keep: float, **settings) -> tuple[dict, dict[str, int], nn.Module]:
    compress(model, output=output, keep=keep, method=method, windows=WINDOWS, settings=settings, dtype=torch.float64)
    manifest = json.loads((output / "planish.json").read_text())
    return manifest, manifest["plan"], load(output)


@torch.no_grad()
def check(naive: nn.Module, ours: nn.Module, dense: nn.Module) -> None:
    a, b, c = (m(TEST, use_cache=False).logits for m in (naive, ours, dense))
    assert (a - b).norm() < 1e-5 * a.norm(), float((a - b).norm() / a.norm())  # norms compute in fp32
    assert (a - c).norm() > 1e-2 * c.norm(), "nothing was cut"


def top(gram: Tensor, rank: int) -> Tensor:
    """Projection onto the `rank` largest eigenvectors."""
    q = torch.linalg.eigh(gram)[1][:, -rank:]
    return q @ q.T


def clip(importance: list[float], budget: float) -> list[float]:
    """FLAT-LLM's iteration: shares of the budget by importance; what exceeds 1 is fixed there, the rest shared again."""
    shares, active = [1.0] * len(importance), set(range(len(importance)))
    while True:
        total = sum(importance[i] for i in active)
        over = [i for i in active if budget * importance[i] > total]
        if not over:
            for i in active:
                shares[i] = budget * importance[i] / total
            return shares
        active -= set(over)
        budget -= len(over)


@torch.no_grad()
@pytest.mark.parametrize(
    ("keep", "family", "qk"),
    tiny.pick(
        [(0.85, "llama_gqa", "dense"), (0.6, "qwen2", "dense"), (0.6, "llama_gqa", "pca")],
        [(keep, family, qk) for keep in (0.85, 0.6) for family in ("llama_gqa", "qwen2") for qk in ("dense", "pca")],
    ),
)
def test_flat_llm(family, qk, keep, tmp_path):
    model = build(family)
    manifest, plan, ours = run(model, tmp_path / "out", "flat-llm", keep, qk=qk)

    blocks = capture(model, {str(i): b for i, b in enumerate(model.model.layers)})
    cosines = [nn.functional.cosine_similarity(x, y, dim=-1).clamp(0, 1) for x, y in blocks.values()]
    importance = [float((c.arccos() / pi).mean()) for c in cosines]
    assert list(manifest["notes"]["importance"].values()) == pytest.approx(importance, rel=1e-9)
    sizes = {r: m.weight.numel() for r, m in linears(model, 0).items()}
    dense = sizes["q"] + sizes["k"] if qk == "dense" else 0
    share = (keep * sum(sizes.values()) - dense) / (sum(sizes.values()) - dense)
    width, neurons = linears(model, 0)["v"].out_features // GROUPS, linears(model, 0)["down"].in_features
    for i, w in enumerate(clip(importance, 4 * share)):
        for name, full in (("vo", width), ("mlp", neurons)):
            # what rounding down leaves over buys one more rank here and there; pairs of heads are coarser still
            slack = 1 if qk == "dense" else 2
            assert int(w * full) <= plan[f"{i}.{name}"] <= min(full, int(w * full) + slack), (i, name, w)

    naive = copy.deepcopy(model)
    for i in range(4):  # sequential: statistics of what is already compressed
        seen, block = capture(naive, linears(naive, i)), linears(naive, i)
        for role, heads, rank in (("v", GROUPS, f"{i}.vo"), ("q", HEADS, f"{i}.q"), ("k", GROUPS, f"{i}.k")):
            outputs, weight, bias = seen[role][1].unflatten(-1, (heads, -1)), block[role].weight, block[role].bias
            for h in range(heads if rank in plan else 0):
                rows = slice(h * outputs.shape[-1], (h + 1) * outputs.shape[-1])
                projection = top(outputs[:, h].T @ outputs[:, h], plan[rank])
                weight[rows] = projection @ weight[rows]
                if bias is not None:
                    bias[rows] = projection @ bias[rows]
        x, down = seen["down"][0], block["down"].weight
        gram = x.T @ x / len(x)
        leverage = (
            gram @ torch.linalg.inv(gram + 1e-2 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype))
        ).diagonal()
        kept = leverage.argsort(descending=True)[: plan[f"{i}.mlp"]]
        refit = down @ gram[:, kept] @ torch.linalg.inv(gram[kept][:, kept])
        down.zero_()
        down[:, kept] = refit
    check(naive, ours, model)


def whiten(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """SVD of W S with S Sᵀ = X Xᵀ, and S."""
    root = torch.linalg.cholesky(x.T @ x)
    return *torch.linalg.svd(w @ root, full_matrices=False), root


@torch.no_grad()
@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("family", ["llama_gqa", "qwen2"])
def test_svd_llm(family, update, tmp_path):
    model = build(family)
    _, plan, ours = run(model, tmp_path / "out", "svd-llm", 0.6, update=update)
    naive = copy.deepcopy(model)
    for i in range(4):
        dense, seen = capture(model, linears(model, i)), capture(naive, linears(naive, i))
        for role, linear in linears(naive, i).items():
            w, (x, _), rank = linears(model, i)[role].weight, dense[role], plan[f"{i}.{role}"]
            if rank == min(w.shape):
                continue
            u, s, vh, root = whiten(w, x)
            a, b = s[:rank].sqrt()[:, None] * vh[:rank] @ torch.linalg.inv(root), u[:, :rank] * s[:rank].sqrt()
            if update:  # V1: B by least squares of the dense outputs on what the compressed prefix gives
                b = torch.linalg.lstsq(seen[role][0] @ a.T, x @ w.T).solution.T
            linear.weight.copy_(b @ a)
    check(naive, ours, model)


@torch.no_grad()
@pytest.mark.parametrize("metric", ["plain", "whitened"])
def test_erc_svd(metric, tmp_path):
    model = build("qwen2")
    _, plan, ours = run(model, tmp_path / "out", "erc-svd", 0.7, k=3, residual_metric=metric)
    naive = copy.deepcopy(model)
    for i in range(4):
        seen = capture(model, linears(model, i))
        for role, linear in linears(naive, i).items():
            w, rank = linear.weight.clone(), plan[f"{i}.{role}"]
            if rank == min(w.shape):
                assert i == 0 or rank * sum(w.shape) >= w.numel()  # the first N − k blocks are whole
                continue
            second = round(0.05 * w.numel() / sum(w.shape))
            u, s, vh, root = whiten(w, seen[role][0])
            first = u[:, : rank - second] * s[: rank - second] @ vh[: rank - second] @ torch.linalg.inv(root)
            rest = w - first if metric == "plain" else (w - first) @ root
            u, s, vh = torch.linalg.svd(rest, full_matrices=False)
            rest = u[:, :second] * s[:second] @ vh[:second]
            linear.weight.copy_(first + (rest if metric == "plain" else rest @ torch.linalg.inv(root)))
    check(naive, ours, model)


@torch.no_grad()
def test_erc_svd_searches_the_last_blocks_error(tmp_path):
    """What the search has measured is the written model's error, and the k with the least of it wins."""
    model = build("llama_gqa")
    manifest, _, _ = run(model, tmp_path / "out", "erc-svd", 0.7, windows=24)
    last = lambda m: capture(m, {"last": m.model.layers[-1]})["last"][1]  # noqa: E731
    measured = {}
    for k in manifest["notes"]["searched"]:
        _, _, cut = run(model, tmp_path / k, "erc-svd", 0.7, k=int(k))
        measured[k] = float((last(cut) - last(model)).square().sum(-1).mean())
    assert manifest["notes"]["searched"] == pytest.approx(measured, rel=1e-5) and len(measured) > 2
    assert str(manifest["notes"]["k"]) == min(measured, key=lambda k: measured[k])


def test_erc_svd_whitens_a_weight_once_for_every_k(monkeypatch, tmp_path):
    """Once to search, whatever the number of values of k, and once to solve."""
    seen: Counter[str] = Counter()
    plain = TwoStageSVD.decompose

    def count(self, unit, *args):
        seen[str(unit)] += 1
        return plain(self, unit, *args)

    monkeypatch.setattr(TwoStageSVD, "decompose", count)
    manifest, _, _ = run(build("llama_gqa"), tmp_path / "out", "erc-svd", 0.7)
    assert len(manifest["notes"]["searched"]) > 2 and len(seen) == 4 * 7 and max(seen.values()) == 2
