"""The closed set of modules that replace parts of a block. (This file travels with compressed models.)

Linear forms: a dense `nn.Linear` of another shape, `Pair`, `Pivoted`. Whole submodules: `Attention` (fewer value
dimensions or rotary pairs than the stock one), `Bypass`. `Fused` stands for a family's fused linear while its roles
have different forms. A block's `spec` is JSON; `install` builds empty modules from it, for compressing and loading alike:

    {"linears": {role: {"kind": "dense", "out": 8, "in": 16} | {"kind": "pair" | "pivoted", "rank": 4}},
     "attention": {"kind": "own", "qk": 64, "v": 48, "pairs": 30} | {…, "k_rank": 96, "k_groups": 1, "k_form": "frequency"}
                 | {"kind": "bypass", "rank": 8, ...},
     "mlp": {"kind": "bypass", "rank": 0, ...},
     "slice": {"in": 48, "mid": 48, "out": 64}}
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from .families import FAMILIES, Family
from .families import Fused as FusedRow

Spec = dict[str, Any]


class Pair(nn.Module):
    """y = B (A x) + bias: A (rank, in), B (out, rank)."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, **kw):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.A = nn.Linear(in_features, rank, bias=False, **kw)
        self.B = nn.Linear(rank, out_features, bias=bias, **kw)

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.A(x))

    def dense(self) -> Tensor:
        return self.B.weight @ self.A.weight


class Pivoted(nn.Module):
    """y = [P x, C (P x)][order], plus bias: P (rank, in), C (out − rank, rank), `order` (out,) a permutation.

    r(in + out − r) numbers for any linear of rank r, and as many multiplications; `benchmarks/pivoted.py` times it.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, **kw):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.P = nn.Linear(in_features, rank, bias=False, **kw)
        self.C = nn.Linear(rank, out_features - rank, bias=False, **kw)
        self.bias = nn.Parameter(torch.zeros(out_features, **kw)) if bias else None
        self.register_buffer("order", torch.arange(out_features, dtype=torch.int32, device=kw.get("device")))

    def forward(self, x: Tensor) -> Tensor:
        base = self.P(x)
        y = torch.cat([base, self.C(base)], dim=-1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias

    def dense(self) -> Tensor:
        return torch.cat([self.P.weight, self.C.weight @ self.P.weight]).index_select(0, self.order)


class HeadPair(nn.Module):
    """y_h = U_h (A_h x) + bias_h per head: A (heads · rank, in), U (heads, d, rank); one low-rank pair for each head."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, heads: int, **kw):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.A = nn.Linear(in_features, heads * rank, bias=False, **kw)
        self.U = nn.Parameter(torch.zeros(heads, out_features // heads, rank, **kw))
        self.bias = nn.Parameter(torch.zeros(out_features, **kw)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        z = self.A(x).unflatten(-1, (self.U.shape[0], 1, -1))
        y = (z @ self.U.transpose(1, 2)).flatten(-3)
        return y if self.bias is None else y + self.bias

    def dense(self) -> Tensor:
        return (self.U @ self.A.weight.unflatten(0, (self.U.shape[0], -1))).flatten(0, 1)


class Fused(nn.Module):
    """Several linears over one input whose outputs are laid out as a family's own fused linear lays them out."""

    def __init__(self, parts: dict[str, nn.Module], layout: str, heads: int):
        super().__init__()
        self.roles, self.layout, self.heads = tuple(parts), layout, heads
        for role, module in parts.items():
            setattr(self, role, module)

    def forward(self, x: Tensor) -> Tensor:
        parts = [getattr(self, r)(x) for r in self.roles]
        if self.layout == "rows":
            return torch.cat(parts, dim=-1)
        return torch.stack([p.unflatten(-1, (self.heads, -1)) for p in parts], dim=-2).flatten(-3)

    def join(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the family's own linear; all parts must be dense."""
        weights, biases = ([getattr(getattr(self, r), n) for r in self.roles] for n in ("weight", "bias"))
        if self.layout == "rows":
            return torch.cat(weights), None if biases[0] is None else torch.cat(biases)
        join = lambda ts: torch.stack([t.unflatten(0, (self.heads, -1)) for t in ts], 1).flatten(0, 2)  # noqa: E731
        return join(weights), None if biases[0] is None else join(biases)


def split_fused(w: Tensor, row: FusedRow, sizes: list[int], heads: int) -> list[Tensor]:
    """Rows of a fused weight (or bias) for each role; the inverse of `Fused.join`."""
    if row.layout == "rows":
        return list(w.split(sizes))
    return [t.flatten(0, 1) for t in w.unflatten(0, (heads, len(row.roles), -1)).unbind(1)]


class Bypass(nn.Module):
    """What is added to the residual stream in place of a removed submodule: g ⊙ x + b + (x − μ) U, U = V W of low rank.

    Stored with the constant folded (b − μ U): `gate` (d,), `shift` (d,), `V` (rank, d), `W` (d, rank); each optional.
    `rank` ≥ d/2 stores one d × d matrix in `V`. With nothing at all it contributes zero.
    """

    def __init__(self, width: int, rank: int, gate: bool, shift: bool, as_tuple: bool, factored: bool = True, **kw):
        super().__init__()
        self.rank, self.as_tuple = rank, as_tuple
        self.gate = nn.Parameter(torch.zeros(width, **kw)) if gate else None
        self.shift = nn.Parameter(torch.zeros(width, **kw)) if shift else None
        self.V = nn.Linear(width, rank if factored else width, bias=False, **kw) if rank else None
        self.W = nn.Linear(rank, width, bias=False, **kw) if rank and factored else None

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        x = hidden_states
        y = torch.zeros_like(x) if self.gate is None else self.gate * x
        if self.shift is not None:
            y = y + self.shift
        if self.V is not None:
            z = self.V(x)
            y = y + (z if self.W is None else self.W(z))
        return (y, None) if self.as_tuple else y


class SlicedNorm(nn.Module):
    """RMSNorm without weight of a `full`-wide vector that is given in a basis of fewer directions."""

    def __init__(self, full: int, epsilon: float):
        super().__init__()
        self.full, self.epsilon = full, epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.full + self.epsilon)).to(x.dtype)


class SlicedBlock(nn.Module):
    """A block whose residual stream has `in`, `mid` and `out` channels, each in a basis of its own (SliceGPT).

    h = S_a x + attention(norm(x)), y = S_m h + mlp(norm(h)): the shortcuts S_a (mid, in) and S_m (out, mid) change
    from one basis to the next. Everything else keeps the stock block's names.
    """

    def __init__(self, stock: nn.Module, family: Family, form: Spec, full: int):
        super().__init__()
        p = next(stock.parameters())
        kw = {"device": p.device, "dtype": p.dtype, "bias": False}
        for name, module in stock.named_children():
            self.add_module(name, module)
        for path in (family.attention_norm, family.mlp_norm):
            norm = stock.get_submodule(path)
            set_module(self, path, SlicedNorm(full, norm.variance_epsilon))  # type: ignore[arg-type]
        self.attention_shortcut = nn.Linear(form["in"], form["mid"], **kw)
        self.mlp_shortcut = nn.Linear(form["mid"], form["out"], **kw)
        self.paths = (family.attention_norm, family.attention, family.mlp_norm, family.mlp)
        for name in ("attention_type", "layer_idx"):
            if hasattr(stock, name):
                setattr(self, name, getattr(stock, name))

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        attention_norm, attention, mlp_norm, mlp = (self.get_submodule(p) for p in self.paths)
        attended = attention(hidden_states=attention_norm(hidden_states), **kwargs)
        h = self.attention_shortcut(hidden_states) + (attended[0] if isinstance(attended, tuple) else attended)
        return self.mlp_shortcut(h) + mlp(mlp_norm(h))


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2·p channels of x (..., d) as pairs (j, j + p); cos, sin (..., p); the rest passes through."""
    p = cos.shape[-1]
    a, b, *rest = x.split([p, p, x.shape[-1] - 2 * p] if x.shape[-1] > 2 * p else p, dim=-1)
    return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin), *rest], dim=-1)


class Attention(nn.Module):
    """Multi-head attention with `qk` query/key and `v` value dimensions per head, for every family of the table.

    Takes over the stock module's norms, scale (of the ORIGINAL head dimension), window, soft cap and layer index.
    With `pairs`, kv group j keeps the rotary pairs `pairs[j]` (kv_heads, p): the call's cos and sin are gathered by it, one
    row per token position, and serve queries and keys.
    """

    def __init__(self, stock: nn.Module, config, family: Family, qk: int, v: int, pairs: int | None):
        super().__init__()
        heads, kv_heads = count_heads(config)
        config = getattr(stock, "config", config)  # the one that the model's attention implementation is set in
        self.config, self.layer_idx, self.is_causal = config, stock.layer_idx, getattr(stock, "is_causal", True)
        self.heads, self.kv_heads, self.qk, self.v = heads, kv_heads, qk, v
        self.head_dim, self.num_key_value_groups = qk, heads // kv_heads
        self.scaling = stock.scaling if hasattr(stock, "scaling") else stock.softmax_scale
        self.dropout = float(getattr(stock, "attention_dropout", getattr(stock, "dropout", 0.0)) or 0.0)
        window = getattr(stock, "sliding_window", None) if hasattr(stock, "sliding_window") else None
        if family.window and not hasattr(stock, "sliding_window"):
            window = getattr(config, "sliding_window", None)
        self.sliding_window = window
        self.softcap = getattr(stock, "attn_logit_softcapping", None) if family.softcap else None
        self.rotary = family.rotary
        self.q_norm, self.k_norm = getattr(stock, "q_norm", None), getattr(stock, "k_norm", None)
        if pairs:
            device = next(stock.parameters()).device
            self.register_buffer("pairs", torch.zeros(kv_heads, pairs, dtype=torch.int32, device=device))
        else:
            self.pairs = None
        # q_proj, k_proj, v_proj, o_proj are set by `install`

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        layer_past=None,
        position_bias: Tensor | None = None,
        **kwargs,
    ):
        shape = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*shape, self.kv_heads, -1, self.qk)
        key = self.k_proj(hidden_states).view(*shape, self.kv_heads, 1, self.qk)
        value = self.v_proj(hidden_states).contiguous().view(*shape, -1, self.v).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.rotary and position_embeddings is not None:
            cos, sin = self.turn(position_embeddings)
            query, key = rotate_pairs(query, cos, sin), rotate_pairs(key, cos, sin)
        query, key = query.flatten(2, 3).transpose(1, 2), key.squeeze(3).transpose(1, 2)
        cache = past_key_values if past_key_values is not None else layer_past
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        # vLLM reads this call off the source: one per `forward`, through a local name, with `scaling=self.…`
        mask, extra = self.settings(key, attention_mask, position_bias)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation or "eager", eager_attention)
        dropout = self.dropout if self.training else 0.0
        query, key, value = self.level(query, key, value)
        output, weights = attend(
            self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **extra, **kwargs
        )
        if value.shape[-1] > self.v:
            output = output[..., : self.v]
        return self.o_proj(output.reshape(query.shape[0], query.shape[2], -1).contiguous()), weights

    def turn(self, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """cos and sin (batch, tokens, kv_heads or 1, 1, pairs) of the pairs that every kv group has."""
        cos, sin = position_embeddings
        if self.pairs is None:
            half = cos.shape[-1] // 2
            return cos[..., None, None, :half], sin[..., None, None, :half]
        at, shape = self.pairs.flatten(), (*cos.shape[:-1], self.kv_heads, 1, -1)
        return cos.index_select(-1, at).view(shape), sin.index_select(-1, at).view(shape)

    def level(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Heads filled up with zeros to one size where PyTorch's attention is several times slower without: on the CPU.

        Scores stay; the output's channels beyond `v` are zero. What the cache holds is untouched.
        """
        qk, v = query.shape[-1], value.shape[-1]
        if qk == v or query.device.type != "cpu" or self.config._attn_implementation != "sdpa":
            return query, key, value
        if qk > v:
            return query, key, nn.functional.pad(value, (0, qk - v))
        return nn.functional.pad(query, (0, v - qk)), nn.functional.pad(key, (0, v - qk)), value

    def settings(self, key: Tensor, attention_mask, position_bias) -> tuple[Tensor | None, dict]:
        """The attention's mask, and the arguments that only some families' attentions take."""
        if position_bias is not None:
            attention_mask = add_position_bias(position_bias, attention_mask, key)
        extra = {}
        if self.sliding_window is not None:
            extra["sliding_window"] = self.sliding_window
        if self.softcap is not None:
            extra["softcap"] = self.softcap
        return attention_mask, extra


class Latent(Attention):
    """Attention that caches `rank` numbers for each of `groups` sets of kv heads in place of their keys.

    Keys are rebuilt at every call, k = U z with U (groups, heads of a group · qk, rank), then normalised and rotated at
    their positions, which the cache's layer remembers. Costs a product with U per cached token.
    """

    def __init__(self, stock: nn.Module, config, family: Family, qk: int, v: int, rank: int, groups: int):
        super().__init__(stock, config, family, qk, v, None)
        weight = next(stock.parameters())
        kw = {"device": weight.device, "dtype": weight.dtype}
        self.U = nn.Parameter(torch.zeros(groups, self.kv_heads // groups * qk, rank, **kw), requires_grad=False)
        self.layer_type = getattr(stock, "layer_type", None)
        self.tables = make_rotary(stock) if family.rotary else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        layer_past=None,
        position_bias: Tensor | None = None,
        **kwargs,
    ):
        shape = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*shape, -1, self.qk).transpose(1, 2)
        latent = self.k_proj(hidden_states).view(*shape, len(self.U), -1).transpose(1, 2)
        value = self.v_proj(hidden_states).contiguous().view(*shape, -1, self.v).transpose(1, 2)
        cache = past_key_values if past_key_values is not None else layer_past
        if cache is not None:
            if getattr(cache, "is_compileable", False):
                raise NotImplementedError("attention on latent keys needs a cache that grows, such as DynamicCache")
            latent, value = cache.update(latent, value, self.layer_idx)
        key = (latent @ self.U.mT).unflatten(-1, (-1, self.qk)).transpose(2, 3).flatten(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.tables is not None:
            layer = None if cache is None else cache.layers[self.layer_idx]
            at = find_positions(layer, kwargs.get("position_ids"), shape[1], key)
            kind = () if self.layer_type is None or not hasattr(self.tables, "layer_types") else (self.layer_type,)
            cos, sin = (t[:, None, :, : t.shape[-1] // 2] for t in self.tables(value, at, *kind))
            key = rotate_pairs(key, cos, sin)
            query = rotate_pairs(query, cos[:, :, -query.shape[2] :], sin[:, :, -query.shape[2] :])
        # vLLM reads this call off the source: one per `forward`, through a local name, with `scaling=self.…`
        mask, extra = self.settings(key, attention_mask, position_bias)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation or "eager", eager_attention)
        dropout = self.dropout if self.training else 0.0
        query, key, value = self.level(query, key, value)
        output, weights = attend(
            self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **extra, **kwargs
        )
        if value.shape[-1] > self.v:
            output = output[..., : self.v]
        return self.o_proj(output.reshape(query.shape[0], query.shape[2], -1).contiguous()), weights

    def rebuild(self, k: Tensor) -> Tensor:
        """k_proj's weight (groups · rank, hidden) or bias (groups · rank,) as that of the keys themselves."""
        groups, _, rank = self.U.shape
        return (self.U.data @ k.reshape(groups, rank, -1)).reshape(-1, *k.shape[1:])


class Frequencies(Attention):
    """Attention whose kv heads of one set share `rank` rotated key channels; only those are cached, nothing is rebuilt.

    Channel pair ρ of set g has the rotary frequency `frequencies[g, ρ]`; head j's key at it is Σ_ρ u_jρ z_ρ, complex. The
    query of a head of j is multiplied by ū_jρ, channel by channel, and meets z itself. `U` (2, kv_heads, pairs): u. In the
    cache the values of a set lie side by side, so that it has as many heads as there are sets.
    """

    def __init__(self, stock: nn.Module, config, family: Family, qk: int, v: int, rank: int, groups: int):
        super().__init__(stock, config, family, qk, v, None)
        weight = next(stock.parameters())
        kw = {"device": weight.device, "dtype": weight.dtype}
        self.sets, self.num_key_value_groups = groups, self.heads // groups
        self.U = nn.Parameter(torch.zeros(2, self.kv_heads, rank // 2, **kw), requires_grad=False)
        self.register_buffer("frequencies", torch.zeros(groups, rank // 2, dtype=torch.int32, device=weight.device))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        layer_past=None,
        position_bias: Tensor | None = None,
        **kwargs,
    ):
        assert position_embeddings is not None
        shape = hidden_states.shape[:-1]
        at = self.frequencies.flatten()
        cos, sin = (
            t.index_select(-1, at).unflatten(-1, self.frequencies.shape).transpose(1, 2) for t in position_embeddings
        )
        query = self.pick(self.q_proj(hidden_states)).view(*shape, self.heads, -1).transpose(1, 2)
        real, imaginary = self.U.repeat_interleave(self.heads // self.kv_heads, 1).unsqueeze(2).unbind(0)
        query = rotate_pairs(query, real, -imaginary)  # by ū
        grouped = query.unflatten(1, (self.sets, -1))
        query = rotate_pairs(grouped, cos.unsqueeze(2), sin.unsqueeze(2)).flatten(1, 2)
        key = rotate_pairs(self.k_proj(hidden_states).view(*shape, self.sets, -1).transpose(1, 2), cos, sin)
        value = self.v_proj(hidden_states).view(*shape, self.sets, -1).transpose(1, 2)
        cache = past_key_values if past_key_values is not None else layer_past
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        # vLLM reads this call off the source: one per `forward`, through a local name, with `scaling=self.…`
        mask, extra = self.settings(key, attention_mask, position_bias)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation or "eager", eager_attention)
        dropout = self.dropout if self.training else 0.0
        query, key, value = self.level(query, key, value)
        output, weights = attend(
            self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **extra, **kwargs
        )
        shared = self.kv_heads // self.sets
        own = output[..., : shared * self.v].unflatten(-1, (shared, -1)).unflatten(2, (self.sets, shared, -1))
        output = own.diagonal(dim1=3, dim2=5).movedim(-1, 3)  # every head's own values of its set's
        return self.o_proj(output.reshape(query.shape[0], query.shape[2], -1)), weights

    def pick(self, query: Tensor) -> Tensor:
        """The channels of every query head (…, heads · qk) at its set's frequencies: (…, heads · rank)."""
        pairs = self.frequencies.repeat_interleave(self.heads // self.sets, 0)
        at = torch.cat([pairs, pairs + self.qk // 2], 1)
        first = torch.arange(0, self.heads * self.qk, self.qk, dtype=at.dtype, device=at.device)
        return query.index_select(-1, (at + first[:, None]).flatten())

    def rebuild(self, k: Tensor) -> Tensor:
        """k_proj's weight (groups · rank, hidden) or bias (groups · rank,) as that of the keys themselves."""
        sets, pairs = self.frequencies.shape
        shared = self.kv_heads // self.sets
        z = k.reshape(sets, 1, 2, pairs, -1).to(self.U.dtype)
        real, imaginary = self.U.unflatten(1, (sets, shared)).unsqueeze(-1)  # (sets, shared, pairs, 1)
        parts = torch.stack([real * z[:, :, 0] - imaginary * z[:, :, 1], real * z[:, :, 1] + imaginary * z[:, :, 0]], 2)
        out = parts.new_zeros(sets, shared, 2, self.qk // 2, parts.shape[-1])
        at = self.frequencies.long()[:, None, None, :, None].expand_as(parts)
        return out.scatter_add(3, at, parts).reshape(self.kv_heads * self.qk, *k.shape[1:])


def find_positions(layer: Any, given: Tensor | None, new: int, key: Tensor) -> Tensor:
    """Positions (batch or 1, tokens) of all keys (batch, heads, tokens, qk): `given` for the last `new`, for those before as
    they were given then, which a layer of a cache is told here. Unknown ones count up to the next that is known.
    """
    batch, past = len(key), key.shape[2] - new
    if given is None:
        given = torch.arange(past, past + new, device=key.device)
    given = given.reshape(-1, new).to(key.device)
    told = getattr(layer, "positions", None)
    if told is not None:
        told = told[:, -past:] if getattr(layer, "is_sliding", False) and past else told[:, :past]
    if told is None or told.shape[1] != past or len(told) not in (1, batch):
        told = given[:, :1] + torch.arange(-past, 0, device=key.device)
    rows = max(len(given), len(told))
    at = torch.cat([told.expand(rows, -1), given.expand(rows, -1)], 1)
    if layer is not None:
        layer.positions = at
    return at


def make_rotary(stock: nn.Module) -> nn.Module:
    """The rotary tables' module of a stock attention's own family."""
    names = vars(sys.modules[type(stock).__module__])
    kind = next(c for n, c in names.items() if n.endswith("RotaryEmbedding"))
    return kind(config=stock.config)


def add_position_bias(bias: Tensor, masked: Tensor | None, key: Tensor) -> Tensor:
    """ALiBi's (heads, 1, positions) and MPT's mask, true where masked, as one additive mask (B, heads, queries, keys)."""
    bias = bias[None, :, :, -key.shape[2] :].to(key.dtype)
    return bias if masked is None else bias.masked_fill(masked, torch.finfo(key.dtype).min)


def eager_attention(module, query, key, value, mask, scaling, dropout=0.0, softcap=None, **_):
    """softmax(q kᵀ · scaling + mask) v with key and value heads shared within a group. Returns (B, T, heads, v), weights."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def needs_eager(config) -> bool:
    """Whether attention scores have a soft cap (gemma2): transformers' default, PyTorch's attention, leaves it out silently."""
    return getattr(config, "attn_logit_softcapping", None) is not None


def head_width(stock: nn.Module) -> int:
    return getattr(stock, "head_dim", None) or stock.head_size


def rotary_width(stock: nn.Module, family: Family) -> int:
    """How many channels of a head are rotated."""
    if not family.rotary:
        return 0
    parameters = getattr(stock.config, "rope_parameters", None) or {}
    return int(head_width(stock) * parameters.get("partial_rotary_factor", 1.0))


def get_module(root: nn.Module, path: str) -> nn.Module:
    return root.get_submodule(path)


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def get_linear(block: nn.Module, family: Family, role: str) -> nn.Module:
    """A role's module in a canonical block, wherever an edit has moved it."""
    attention = block.get_submodule(family.attention)
    if role in "qkvo" and isinstance(attention, Attention):
        return getattr(attention, f"{role}_proj")
    return block.get_submodule(family.path(role))


def count_heads(config) -> tuple[int, int]:
    heads = config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads


def split_block(block: nn.Module, family: Family, config) -> nn.Module:
    """Make a stock block canonical, in place: fused linears become `Fused`, so that every role is a linear of its own."""
    heads, kv_heads = count_heads(config)
    if family.conv1d:
        swap_linears(block, family, Conv1D, lambda c: make_linear(c.weight.data.T, c.bias.data))
    for row in family.fused:
        try:
            stock = block.get_submodule(row.path)
        except AttributeError:  # an edit has replaced the submodule that held it
            continue
        if isinstance(stock, Fused):
            continue
        out = stock.out_features
        if "q" in row.roles:
            width = out // (heads + 2 * kv_heads)
            sizes = [heads * width, kv_heads * width, kv_heads * width]
        else:
            sizes = [out // len(row.roles)] * len(row.roles)
        weights = split_fused(stock.weight.data, row, sizes, heads)
        biases = [None] * len(sizes) if stock.bias is None else split_fused(stock.bias.data, row, sizes, heads)
        parts = {r: make_linear(w, b) for r, w, b in zip(row.roles, weights, biases, strict=True)}
        set_module(block, row.path, Fused(parts, row.layout, heads))
    return block


def make_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear that holds these tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.contiguous(), requires_grad=bias.requires_grad)
    return linear


def join_block(block: nn.Module, family: Family) -> nn.Module:
    """Undo `split_block` wherever every part of a fused linear is dense and the layout allows it, in place."""
    for row in family.fused:
        try:
            fused = block.get_submodule(row.path)
        except AttributeError:
            continue
        if not isinstance(fused, Fused) or not all(type(getattr(fused, r)) is nn.Linear for r in fused.roles):
            continue
        set_module(block, row.path, make_linear(*fused.join()))
    if family.conv1d:
        swap_linears(block, family, nn.Linear, make_conv1d)
    return block


def swap_linears(block: nn.Module, family: Family, kind: type, make: Callable[[Any], nn.Module]) -> None:
    """Replace every module of exactly this kind that stands where the family has a linear, in place."""
    for path in (*family.linears.values(), *(row.path for row in family.fused)):
        try:
            module = block.get_submodule(path)
        except AttributeError:  # an edit has replaced the submodule that held it
            continue
        if type(module) is kind:
            set_module(block, path, make(module))


def make_conv1d(linear: nn.Linear) -> nn.Module:
    """The transposed form in which GPT-2 stores a linear with a bias; one without stays a linear."""
    if linear.bias is None:
        return linear
    with torch.device("meta"):
        conv = Conv1D(linear.out_features, linear.in_features)
    conv.weight = nn.Parameter(linear.weight.T.contiguous(), requires_grad=linear.weight.requires_grad)
    conv.bias = linear.bias
    return conv


def build_linear(form: Spec, stock: nn.Linear) -> nn.Module:
    """A linear of the given form with the stock one's dtype, device and bias; its weights are still to be filled."""
    kw = {"device": stock.weight.device, "dtype": stock.weight.dtype}
    out, n, bias = form.get("out", stock.out_features), form.get("in", stock.in_features), stock.bias is not None
    linear: nn.Module
    if form["kind"] == "dense":
        linear = nn.Linear(n, out, bias=form.get("bias", bias), **kw)
    elif form["kind"] == "head_pair":
        linear = HeadPair(n, out, form["rank"], form.get("bias", bias), form["heads"], **kw)
    else:
        kind = {"pair": Pair, "pivoted": Pivoted}[form["kind"]]
        linear = kind(n, out, form["rank"], form.get("bias", bias), **kw)
    own = linear.B if isinstance(linear, Pair) else linear
    if bias and own.bias is not None and own.bias.shape == stock.bias.shape:
        own.bias = nn.Parameter(stock.bias.detach().clone(), requires_grad=False)
    return linear


def install(block: nn.Module, spec: Spec, family: Family, config) -> nn.Module:
    """Give a stock block the (empty) modules that `spec` names, in place; the same call serves solving and loading.

    Returns the block, which is another object only where its residual stream is sliced.
    """
    if not spec:
        return block
    split_block(block, family, config)
    stock = block.get_submodule(family.attention)
    form = spec.get("attention", {})
    linears = {r: block.get_submodule(family.path(r)) for r in family.roles}
    for role, f in spec.get("linears", {}).items():
        linears[role] = build_linear(f, linears[role])
        set_module(block, family.path(role), linears[role])
    if form.get("kind") == "own":
        if "k_rank" in form:
            kind = Frequencies if form.get("k_form") == "frequency" else Latent
            own = kind(stock, config, family, form["qk"], form["v"], form["k_rank"], form["k_groups"])
        else:
            own = Attention(stock, config, family, form["qk"], form["v"], form.get("pairs"))
        for role in "qkvo":
            setattr(own, f"{role}_proj", linears[role])
        set_module(block, family.attention, own)
    elif form.get("kind") == "bypass":
        set_module(block, family.attention, _bypass(form, stock, config, as_tuple=True))
        _drop_norms(block, family.attention_norm if form["raw"] else None, family.attention_post_norm)
    form = spec.get("mlp", {})
    if form.get("kind") == "bypass":
        bypass = _bypass(form, linears["down"], config, as_tuple=False)
        if family.mlp is not None:
            set_module(block, family.mlp, bypass)
        else:
            set_module(block, family.path("up"), bypass)
            set_module(block, family.activation, nn.Identity())
            set_module(block, family.path("down"), nn.Identity())
        _drop_norms(block, family.mlp_norm if form["raw"] else None, family.mlp_post_norm)
    join_block(block, family)
    return SlicedBlock(block, family, spec["slice"], config.hidden_size) if "slice" in spec else block


def _bypass(form: Spec, like: nn.Module, config, as_tuple: bool) -> Bypass:
    p = next(like.parameters())
    return Bypass(
        config.hidden_size,
        form["rank"],
        form["gate"],
        form["shift"],
        as_tuple,
        form.get("factored", True),
        device=p.device,
        dtype=p.dtype,
    )


def _drop_norms(block: nn.Module, *paths: str | None) -> None:
    for path in paths:
        if path is not None:
            set_module(block, path, nn.Identity())


def install_model(model: nn.Module, config) -> None:
    """Install every block's spec in a base model or causal LM, and number the attentions that are left densely."""
    layout = config.planish
    family = FAMILIES[layout["family"]]
    blocks = find_blocks(model, family)
    index = 0
    for i, block in enumerate(blocks):
        block = blocks[i] = install(block, layout["blocks"][i], family, config)
        attention = block.get_submodule(family.attention)
        if not isinstance(attention, Bypass):
            attention.layer_idx = index
            index += 1


def list_attentions(config) -> list[int]:
    """Blocks that still have an attention, in the order of the cache's layers."""
    forms = (spec.get("attention", {}) for spec in config.planish["blocks"])
    return [i for i, form in enumerate(forms) if form.get("kind") != "bypass"]


def find_blocks(model: nn.Module, family: Family) -> nn.ModuleList:
    """The block list of a causal LM or of its base model."""
    path = family.blocks
    try:
        return model.get_submodule(path)
    except AttributeError:
        return model.get_submodule(path.partition(".")[2])


def copy_config(config):
    """The config without its per-layer overrides: what a stock constructor may read."""
    plain = copy.copy(config)
    plain.__dict__.pop("_heterogeneity_spec", None)
    return plain
