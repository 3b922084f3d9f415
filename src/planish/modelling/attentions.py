"""Attentions with other shapes than the stock ones. (This file travels with compressed models.)

`Attention` has fewer value dimensions or rotary pairs than the stock one; `Latent` and `Frequencies` keep latents of keys.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .families import Family
from .heads import count_heads, has_norms, has_rotation, rotary_width
from .modules import FusedRows, take


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2·p channels of x (..., d) as pairs (j, j + p); cos, sin (..., p), maybe wider; the rest passes."""
    p = cos.shape[-1]
    a, b, *rest = x.split([p, p, x.shape[-1] - 2 * p] if x.shape[-1] > 2 * p else p, dim=-1)
    return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin), *rest], dim=-1).to(
        x.dtype
    )


class Attention(nn.Module):
    """Multi-head attention with `qk` query/key and `v` value dimensions per head, for every family of the table.

    Takes over the stock module's norms, scale (of the ORIGINAL head dimension), window, soft cap and layer index.
    With `pairs`, kv group j keeps the rotary pairs `pairs[j]` (kv_heads, p): the call's cos and sin are gathered by it, one
    row per token position, and serve queries and keys.
    """

    def __init__(self, stock: nn.Module, config, family: Family, qk: int, v: int, pairs: int | None):
        super().__init__()
        heads, kv_heads = count_heads(config, stock)
        config = getattr(stock, "config", config)  # the one that the model's attention implementation is set in
        self.config, self.layer_idx, self.is_causal = config, stock.layer_idx, getattr(stock, "is_causal", True)
        self.heads, self.kv_heads, self.qk, self.v = heads, kv_heads, qk, v
        self.head_dim, self.num_key_value_groups = qk, heads // kv_heads
        scales = ("scaling", "softmax_scale", "inv_norm_factor")  # as families call it
        self.scaling = next(getattr(stock, name) for name in scales if hasattr(stock, name))
        self.scaling *= getattr(stock, "key_multiplier", 1.0)  # falcon_h1
        dropout = getattr(stock, "attention_dropout", getattr(stock, "dropout", 0.0))
        self.dropout = float(getattr(dropout, "p", dropout) or 0.0)
        window = getattr(stock, "sliding_window", None) if hasattr(stock, "sliding_window") else None
        if family.window and not hasattr(stock, "sliding_window"):
            window = getattr(config, "sliding_window", None)
        self.sliding_window = window if getattr(stock, "is_sliding", True) else None
        self.softcap = getattr(stock, "attn_logit_softcapping", None) if family.softcap else None
        self.rotary, self.training = has_rotation(stock, family), stock.training
        self.position_scale, self.table_kind = family.position_scale, family.tables
        self.norm_kind, self.norms = family.qk_norm if has_norms(stock, family) else "", family.norms
        self.neighbours = rotary_width(stock, family) if any(f.layout == "neighbours" for f in family.fused) else 0
        for name in self.norms if self.norm_kind else ():
            setattr(self, name, getattr(stock, name))
        self.sinks: nn.Parameter | None = getattr(stock, family.sinks) if family.sinks else None
        if pairs:
            device = next(stock.parameters()).device
            self.register_buffer("pairs", torch.zeros(kv_heads, pairs, dtype=torch.int32, device=device))
        else:
            self.pairs = None
        self.gate_proj: nn.Module | None = None  # with q_proj, k_proj, v_proj and o_proj set by `install`

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
        query, key = self.normalise("width", self.q_proj(hidden_states), self.k_proj(hidden_states))
        query, key = query.view(*shape, self.kv_heads, -1, self.qk), key.view(*shape, self.kv_heads, 1, self.qk)
        value = self.v_proj(hidden_states).contiguous().view(*shape, -1, self.v).transpose(1, 2)
        query, key = self.normalise("head", query, key)
        if self.rotary and position_embeddings is not None:
            cos, sin = self.turn(position_embeddings)
            query, key = rotate_pairs(query, cos, sin), rotate_pairs(key, cos, sin)
        query, key = self.normalise("rotated", query, key)
        query, key = query.flatten(2, 3).transpose(1, 2), key.squeeze(3).transpose(1, 2)
        cache = past_key_values if past_key_values is not None else layer_past
        past = self.count_past(cache)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        query = self.scale(query, kwargs.get("position_ids"), past)
        # vLLM reads this call off the source: one per `forward`, through a local name, with `scaling=self.…`
        mask, extra = self.settings(key, attention_mask, position_bias)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation or "eager", eager_attention)
        dropout = self.dropout if self.training else 0.0
        attend, query, key, value = self.level(attend, query, key, value)
        output, weights = attend(
            self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **extra, **kwargs
        )
        if value.shape[-1] > self.v:
            output = output[..., : self.v]
        return self.finish(output.reshape(query.shape[0], query.shape[2], -1).contiguous(), hidden_states), weights

    def finish(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        """What heads give (batch, tokens, heads · v), gated where the family does that, through the output projection."""
        if self.gate_proj is not None:
            output = output * torch.sigmoid(self.gate_proj(hidden_states))
        return self.o_proj(output)

    def normalise(self, kind: str, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Through their norms, if the family's are of this kind: "width" sees (..., heads · qk), as do "each" and "listed"; the
        others (..., qk)."""
        if self.norm_kind != kind and not (kind == "width" and self.norm_kind in ("each", "listed")):
            return query, key
        q_norm, k_norm = (getattr(self, name) for name in self.norms)
        if self.norm_kind != "width" and kind == "width":
            return self.normalise_each(q_norm, query), self.normalise_each(k_norm, key)
        return q_norm(query), k_norm(key)

    def normalise_each(self, norm: nn.Module, x: Tensor) -> Tensor:
        """x (..., heads · qk) through a norm that has weights for each head, in the order in which the family stores channels."""
        rows = FusedRows("neighbours", (), x.shape[-1] // self.qk, self.neighbours)
        x = (rows.join([x], -1) if self.neighbours else x).unflatten(-1, (-1, self.qk))
        x = (norm(x.transpose(1, 2)).transpose(1, 2) if self.norm_kind == "listed" else norm(x)).flatten(-2)
        return rows.split(x, -1)[0] if self.neighbours else x

    def scale(self, query: Tensor, positions: Tensor | None, past: Any) -> Tensor:
        """Queries (batch, heads, tokens, qk) · (1 + β ln(1 + ⌊position / original length⌋)), where the family has that; in blocks
        without rotation positions count from 1, tokens that the cache held before (`past`) included."""
        config = self.config
        if self.position_scale == "rope_parameters":
            assert positions is not None, "the model passes position_ids to every block"
            length, beta = (
                config.rope_parameters[n] for n in ("original_max_position_embeddings", "llama_4_scaling_beta")
            )
            factor = (1 + beta * torch.log1p(torch.floor(positions / length)))[:, None, :, None]
            return query * factor.to(query.dtype)
        if self.position_scale != "unrotated" or self.rotary or not config.attn_temperature_tuning:
            return query
        at = torch.arange(query.shape[2], device=query.device) + past + 1
        factor = torch.log1p(torch.floor(at.float() / config.floor_scale)) * config.attn_scale + 1
        return (query * factor[:, None]).to(query.dtype)

    def count_past(self, cache: Any) -> Any:
        """Tokens that the cache holds already, where that matters."""
        return cache.get_seq_length(self.layer_idx) if cache is not None and self.position_scale == "unrotated" else 0

    def turn(self, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """cos and sin (batch, tokens, kv_heads or 1, 1, pairs) of the pairs that every kv group has."""
        cos, sin = self.rotations(position_embeddings)
        if self.pairs is None:
            return cos[..., None, None, :], sin[..., None, None, :]
        at, shape = self.pairs.flatten(), (*cos.shape[:-1], self.kv_heads, 1, -1)
        return take(cos, at).view(shape), take(sin, at).view(shape)

    def rotations(self, tables: Any) -> tuple[Tensor, Tensor]:
        """cos and sin (…, pairs) of the model's rotary tables, with one value for each pair."""
        if self.table_kind == "complex":
            return tables.real, tables.imag
        cos, sin = tables
        if self.table_kind == "one":
            return cos, sin
        at = slice(None, None, 2) if self.table_kind == "twins" else slice(cos.shape[-1] // 2)
        return cos[..., at], sin[..., at]

    def level(self, attend: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Any, Tensor, Tensor, Tensor]:
        """The attention to call, and heads filled up with zeros to one size where PyTorch's is several times slower without: on
        the CPU. Scores stay; the output's channels beyond `v` are zero. What the cache holds is untouched.

        One query is two small products there: filling up, and repeating keys and values for every query head as transformers does
        where there is a mask, copy the whole cache for each token. In half precision such products start to pay at long caches.
        """
        qk, v = query.shape[-1], value.shape[-1]
        if query.device.type != "cpu" or self.config._attn_implementation != "sdpa":
            return attend, query, key, value
        single = query.shape[2] == 1 and self.softcap is None and not torch.compiler.is_exporting()
        if single and (query.dtype in (torch.float32, torch.float64) or (qk != v and key.shape[2] >= 1024)):
            return eager_attention, query, key, value
        if qk > v:
            value = nn.functional.pad(value, (0, qk - v))
        elif qk < v:
            query, key = (nn.functional.pad(x, (0, v - qk)) for x in (query, key))
        return attend, query, key, value

    def settings(self, key: Tensor, attention_mask, position_bias) -> tuple[Tensor | None, dict]:
        """The attention's mask, and the arguments that only some families' attentions take."""
        if position_bias is not None:
            attention_mask = add_position_bias(position_bias, attention_mask, key)
        extra = {}
        if self.sliding_window is not None:
            extra["sliding_window"] = self.sliding_window
        if self.softcap is not None:
            extra["softcap"] = self.softcap
        if self.sinks is not None:
            extra["s_aux"] = self.sinks
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
        self.layer_type = getattr(stock, "layer_type", None) or getattr(stock, "attention_type", None)
        self.tables = make_rotary(stock) if self.rotary else None

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
        past = self.count_past(cache)
        if cache is not None:
            if getattr(cache, "is_compileable", False):
                raise NotImplementedError("attention on latent keys needs a cache that grows, such as DynamicCache")
            latent, value = cache.update(latent, value, self.layer_idx)
        key = (latent @ self.U.mT).unflatten(-1, (-1, self.qk)).transpose(2, 3).flatten(1, 2)
        if self.norm_kind in ("width", "each", "listed"):
            query, key = self.normalise("width", *(x.transpose(1, 2).flatten(2) for x in (query, key)))
            query, key = (x.unflatten(-1, (-1, self.qk)).transpose(1, 2) for x in (query, key))
        query, key = self.normalise("head", query, key)
        if self.tables is not None:
            layer = None if cache is None else cache.layers[self.layer_idx]
            at = find_positions(layer, kwargs.get("position_ids"), shape[1], key)
            kind = () if self.layer_type is None or not hasattr(self.tables, "layer_types") else (self.layer_type,)
            cos, sin = (t[:, None] for t in self.rotations(self.tables(value, at, *kind)))
            key = rotate_pairs(key, cos, sin)
            query = rotate_pairs(query, cos[:, :, -query.shape[2] :], sin[:, :, -query.shape[2] :])
        query, key = self.normalise("rotated", query, key)
        query = self.scale(query, kwargs.get("position_ids"), past)
        # vLLM reads this call off the source: one per `forward`, through a local name, with `scaling=self.…`
        mask, extra = self.settings(key, attention_mask, position_bias)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation or "eager", eager_attention)
        dropout = self.dropout if self.training else 0.0
        attend, query, key, value = self.level(attend, query, key, value)
        output, weights = attend(
            self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **extra, **kwargs
        )
        if value.shape[-1] > self.v:
            output = output[..., : self.v]
        return self.finish(output.reshape(query.shape[0], query.shape[2], -1).contiguous(), hidden_states), weights

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
        tables = [take(t, at).unflatten(-1, self.frequencies.shape) for t in self.rotations(position_embeddings)]
        cos, sin = (t.transpose(1, 2) for t in tables)
        query = self.pick(self.q_proj(hidden_states)).view(*shape, self.heads, -1).transpose(1, 2)
        real, imaginary = self.U.repeat_interleave(self.heads // self.kv_heads, 1).unsqueeze(2).unbind(0)
        query = rotate_pairs(query, real, -imaginary)  # by ū
        grouped = query.unflatten(1, (self.sets, -1))
        query = rotate_pairs(grouped, cos.unsqueeze(2), sin.unsqueeze(2)).flatten(1, 2)
        key = rotate_pairs(self.k_proj(hidden_states).view(*shape, self.sets, -1).transpose(1, 2), cos, sin)
        value = self.v_proj(hidden_states).view(*shape, self.sets, -1).transpose(1, 2)
        cache = past_key_values if past_key_values is not None else layer_past
        past = self.count_past(cache)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        query = self.scale(query, kwargs.get("position_ids"), past)
        # vLLM reads this call off the source: one per `forward`, through a local name, with `scaling=self.…`
        mask, extra = self.settings(key, attention_mask, position_bias)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation or "eager", eager_attention)
        dropout = self.dropout if self.training else 0.0
        attend, query, key, value = self.level(attend, query, key, value)
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
        return take(query, (at + first[:, None]).flatten())

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
    told = getattr(layer, "positions", None)
    if told is not None:
        told = told[:, -past:] if getattr(layer, "is_sliding", False) and past else told[:, :past]
        told = told if told.shape[1] == past and len(told) in (1, batch) else None
    if given is None:  # the block says nothing of them
        first = past if told is None or not past else told[:, -1:] + 1
        given = torch.arange(new, device=key.device) + first
    given = given.reshape(-1, new).to(key.device)
    if told is None:
        told = given[:, :1] + torch.arange(-past, 0, device=key.device)
    rows = max(len(given), len(told))
    at = torch.cat([told.expand(rows, -1), given.expand(rows, -1)], 1)
    if layer is not None:
        layer.positions = at
    return at


def make_rotary(stock: nn.Module) -> nn.Module:
    """The rotary tables' module of a stock attention's own family."""
    names = vars(sys.modules[type(stock).__module__])
    kind = next(c for n, c in names.items() if n.endswith("RotaryEmbedding") and "Vision" not in n)
    return kind(config=stock.config)


def add_position_bias(bias: Tensor, masked: Tensor | None, key: Tensor) -> Tensor:
    """ALiBi's (heads, 1, positions) and MPT's mask, true where masked, as one additive mask (B, heads, queries, keys)."""
    bias = bias[None, :, :, -key.shape[2] :].to(key.dtype)
    return bias if masked is None else bias.masked_fill(masked, torch.finfo(key.dtype).min)


def eager_attention(module, query, key, value, mask, scaling, dropout=0.0, **extra):
    """softmax(q kᵀ · scaling + mask) v with key and value heads shared within a group. Returns (B, T, heads, v), weights.

    `mask`: added, or true where a query looks. `extra`: a `softcap`, and `s_aux` (heads,), scores that take part in the softmax,
    with values of zero.
    """
    groups, softcap, s_aux = module.num_key_value_groups, extra.get("softcap"), extra.get("s_aux")
    batch, heads, queries, _ = query.shape
    grouped = query.reshape(batch, heads // groups, groups * queries, -1)  # all that read one kv head, in one product
    scores = (grouped @ key.transpose(2, 3)).view(batch, heads, queries, -1) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = weights[..., : key.shape[2]].to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    output = weights.reshape(batch, heads // groups, groups * queries, -1) @ value
    return output.view(batch, heads, queries, -1).transpose(1, 2).contiguous(), weights
