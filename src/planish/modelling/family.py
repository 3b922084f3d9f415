"""What a row of the table of families says. (This file travels with compressed models.)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")  # roles


@dataclass(frozen=True)
class Fused:
    """A linear that stores rows otherwise than role by role. `layout`: "rows" = one role after the other; "heads" = per kv head
    its queries, its key, its value, or per query head the query and its gate; "neighbours" = one role, whose heads rotate
    channels 2j and 2j + 1 together.

    In a canonical block every role is a linear of its own, and a head rotates channels j and j + half together.
    """

    path: str
    roles: tuple[str, ...]
    layout: str = "rows"


@dataclass(frozen=True)
class ExpertsRow:
    """Feed-forwards alike, of which a router chooses a few for every token. transformers stacks their weights in one module at
    `path`; checkpoints mostly store linears at `path`.17.name one by one, and so does the canonical block.

    `router`: paths of what has a row, or an entry, for every expert, weights first. `count`, `width`, `top`, `groups`,
    `top_groups`: the config's names of how many experts there are, of their neurons, of how many a token reaches; of the groups
    that the router chooses among first, and of how many it chooses. `normalised`: the config's name of whether the gates of
    those that a token reaches add up to the same, whichever they are (empty: always, None: never); `otherwise` they are part
    of a "softmax" over all experts, or each is "apart". `scale`: the router's own name of what gates are multiplied by last,
    one number or one for each expert (empty: 1).
    """

    path: str = (
        "mlp.experts"  # its `gate_up_proj` is (experts, 2 · width, hidden), its `down_proj` (experts, hidden, width)
    )
    hidden: str = (
        ""  # the config's name of the width of what they read and give, where that is not the residual stream's
    )
    transposed: bool = False  # stacked weights have their last two axes the other way round
    inside: bool = False  # gates multiply what experts read, each the sigmoid of its logit, not what they put out
    bound: bool = False  # the shared feed-forward is as wide as an expert
    alternating: bool = False  # of what is stacked, gate's channels and up's take turns
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # the first is empty where there is no gate
    top: str = "num_experts_per_tok"
    count: str = "num_experts"
    width: str = "moe_intermediate_size"
    router: tuple[str, ...] = ("mlp.gate.weight",)
    normalised: str | None = ""
    otherwise: str = "softmax"
    groups: str = "n_group"  # where the config has it
    top_groups: str = "topk_group"
    scale: str = ""
    chooser: str = ""  # path of the router, where another module holds those weights for it
    stacked: bool = False  # in checkpoints too
    fewest: int = 1  # that the router can choose among
    shared: str = (
        ""  # the config's name of how many experts' widths the shared feed-forward has, where that is its width
    )

    @property
    def stacks(self) -> dict[str, tuple[str, ...]]:
        """Stacked parameter → names of the linears whose weights it holds; "_bias" behind it: their biases, where they have any."""
        if not self.names[0]:
            return {"up_proj": self.names[1:2], "down_proj": self.names[2:]}
        return {"gate_up_proj": self.names[:2], "down_proj": self.names[2:]}

    @property
    def roles(self) -> tuple[str, ...]:
        """Those of one expert's linears."""
        return tuple(role for role, name in zip(MLP, self.names, strict=True) if name)

    @property
    def router_path(self) -> str:
        return self.chooser or self.router[0].rpartition(".")[0]

    def reads(self, config: Any) -> int:
        """The width of what experts read, by a model's configuration."""
        return (getattr(config, self.hidden) if self.hidden else None) or config.hidden_size

    def gates(self, settings: object) -> str:
        """What becomes of a token's gates where an expert is missing, by the config or the router's own settings: "chosen",
        "softmax" or "apart"."""
        chosen = self.normalised == "" or bool(self.normalised and getattr(settings, self.normalised))
        return "chosen" if chosen else self.otherwise


@dataclass(frozen=True)
class Family:
    """Paths are relative to the block, except `blocks`, which is relative to the causal LM.

    `linears` and `fused` hold the roles of attention (q k v o) and of the dense feed-forward (gate up down). Those of other
    groups have the group's name before them: "shared.up", "mixer.in", "expert.17.up". Which of all these a block has is
    read off the block itself (`planish.modelling.blocks.read_layout`).
    """

    model_type: str
    classes: tuple[str, str, str]  # config, base model, causal LM, in transformers
    linears: dict[str, str]  # role → path of an nn.Linear; roles inside a fused linear are absent here
    fused: tuple[Fused, ...] = ()
    blocks: str = "model.layers"
    attention: str = "self_attn"
    mlp: str | None = "mlp"  # None: the block itself holds the linears and `activation`
    activation: str = ""
    attention_norm: str | None = (
        "input_layernorm"  # its input is the residual stream; None: the submodule reads that itself
    )
    mlp_norm: str | None = "post_attention_layernorm"
    shared_norm: str = ""  # one for both, in blocks that have no `mlp_norm`
    attention_post_norm: str | None = None  # applied to the contribution before it is added
    mlp_post_norm: str | None = None
    factor: str = ""  # the block's own name of what a contribution is multiplied by before it is added
    # Of queries and keys: per "head", per head once it is "rotated", over the "width" of all heads; with weights for "each"
    # head (…, heads, d), or with a module for each, "listed", which take (batch, heads, tokens, d).
    qk_norm: str = ""
    norms: tuple[str, str] = ("q_norm", "k_norm")  # the attention's names of those norms
    rotary: bool = True
    rotates: str = ""  # the attention's own name of what is set in blocks that rotate; empty: all of them do
    rotates_where: tuple[str, str] | None = None  # all blocks rotate where the config says this, else none
    rotates_without: str = ""  # the config's name of what, where it is not set, makes all blocks rotate
    # Rotary tables have two values for a pair, one half after the other or, "twins", side by side; "one"; or one table of
    # "complex" numbers.
    tables: str = "halves"
    sinks: str = (
        ""  # the attention's own name of a score for each head that stands beside those of the tokens, with no value
    )
    window: bool = False  # attention takes a sliding window
    softcap: bool = False
    mrope: bool = False  # a token has three positions, each for a section of the rotary pairs
    # Queries grow with the logarithm of their position: as "rope_parameters" say, or in blocks that are "unrotated".
    position_scale: str = ""
    parallel: bool = False  # attention and MLP read the same residual, unless the config says otherwise
    in_place: bool = False  # the block adds to what its feed-forward gave without a copy
    conv1d: bool = False  # linears are stored transposed
    tuples: bool = False  # blocks return a tuple, hidden states first
    intermediate: str = "intermediate_size"  # the config's name of the MLP width; empty where it has none
    norm_offset: float = 0.0  # norms scale channels by this + their weight
    # Groups in which more happens between linears than an average of values over tokens, or a product with an activated gate:
    # values that are normalised, outputs of attention that are gated, products that are clamped. With "keys" it is also more with
    # keys than planish's own attentions do, and other blocks may read keys and values: the stock attention stays.
    fixed: tuple[str, ...] = ()
    per_block: tuple[str, ...] = ()  # fields of the config that stock classes read for each block on its own
    # The config's name of the width of what each block is given of every token beside the stream, and the blocks' own of that.
    per_token: tuple[str, str] | None = None
    head: str = "lm_head"  # what stored checkpoints call the model's `lm_head`
    others: Mapping[str, str] = field(default_factory=dict)  # role of a further group ("shared.up") → path
    cached: tuple[str, ...] = ()  # roles of `others` whose outputs the KV cache holds
    state: tuple[
        tuple[str | int, ...], ...
    ] = ()  # numbers that a mixer keeps of a sequence: a sum of products of sizes
    settled: Mapping[str, Any] = field(
        default_factory=dict
    )  # what configs say for `intermediate` to be the width itself
    experts: ExpertsRow | None = None
    renames: tuple[tuple[str, str], ...] = ()  # parts of tensors' names in checkpoints → in transformers' modules

    @property
    def gated(self) -> bool:
        return "gate" in self.roles

    @property
    def roles(self) -> tuple[str, ...]:
        present = set(self.linears) | {r for f in self.fused for r in f.roles}
        return tuple(r for r in ATTENTION + MLP if r in present)

    def path(self, role: str) -> str:
        """Path of a role's linear in the canonical block, in which fused and stacked linears are split."""
        if role.startswith("expert.") and self.experts is not None:
            _, number, name = role.split(".")
            return f"{self.experts.path}.{number}.{self.experts.names[MLP.index(name)]}"
        if role in self.others:
            return self.others[role]
        for f in self.fused:
            if role in f.roles:
                return f"{f.path}.{role}"
        return self.linears[role]

    def read_name(self, stored: str) -> str:
        """A tensor's name in the causal LM, from its name in a checkpoint."""
        for old, new in self.renames:
            stored = stored.replace(old, new)
        return stored

    def store_name(self, name: str) -> str:
        """A tensor's name in checkpoints."""
        for old, new in self.renames:
            name = name.replace(new, old)
        return name


# What several rows have alike.
SELF_ATTENTION = {r: f"self_attn.{r}_proj" for r in "qkvo"}
GATED_MLP = {r: f"mlp.{r}_proj" for r in MLP}
GRANITE_EXPERTS = ExpertsRow(
    path="block_sparse_moe.experts",
    count="num_local_experts",
    width="intermediate_size",
    router=("block_sparse_moe.router.weight",),
    stacked=True,
)
GRANITE_NAMES = (
    (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.experts.gate_up_proj"),
    (".block_sparse_moe.output_linear.weight", ".block_sparse_moe.experts.down_proj"),
    (".block_sparse_moe.router.layer.", ".block_sparse_moe.router."),
)
