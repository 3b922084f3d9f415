"""Where things are in each Hugging Face family: one row each, no logic. (This file travels with compressed models.)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")  # roles


@dataclass(frozen=True)
class Fused:
    """A linear that holds several roles. `layout`: "rows" = one role after the other; "heads" = per head q, k, v."""

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
    of a "softmax" over all experts, or each is "apart".
    """

    path: str = (
        "mlp.experts"  # its `gate_up_proj` is (experts, 2 · width, hidden), its `down_proj` (experts, hidden, width)
    )
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    top: str = "num_experts_per_tok"
    count: str = "num_experts"
    width: str = "moe_intermediate_size"
    router: tuple[str, ...] = ("mlp.gate.weight",)
    normalised: str | None = ""
    otherwise: str = "softmax"
    groups: str = "n_group"  # where the config has it
    top_groups: str = "topk_group"
    stacked: bool = False  # in checkpoints too
    shared: str = ""  # the config's name of how many experts' widths the shared feed-forward has, where that is its width


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
    attention_post_norm: str | None = None  # applied to the contribution before it is added
    mlp_post_norm: str | None = None
    factor: str = ""  # the block's own name of what a contribution is multiplied by before it is added
    qk_norm: str = (
        ""  # of queries and keys: per "head", per head once it is "rotated", or over the "width" of all heads
    )
    norms: tuple[str, str] = ("q_norm", "k_norm")  # the attention's names of those norms
    rotary: bool = True
    window: bool = False  # attention takes a sliding window
    softcap: bool = False
    position_scale: bool = False  # queries grow with the logarithm of their position (Llama 4, Ministral 3)
    parallel: bool = False  # attention and MLP read the same residual, unless the config says otherwise
    conv1d: bool = False  # linears are stored transposed
    tuples: bool = False  # blocks return a tuple, hidden states first
    intermediate: str = "intermediate_size"  # the config's name of the MLP width; empty where it has none
    norm_offset: float = 0.0  # norms scale channels by this + their weight
    # Groups in which more happens between linears than an average of values over tokens, or a product with an activated gate:
    # values that are normalised, outputs of attention that are gated, products that are clamped.
    fixed: tuple[str, ...] = ()
    head: str = "lm_head"  # what stored checkpoints call the model's `lm_head`
    others: Mapping[str, str] = field(default_factory=dict)  # role of a further group ("shared.up") → path
    cached: tuple[str, ...] = ()  # roles of `others` whose outputs the KV cache holds
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


_ATTENTION = {r: f"self_attn.{r}_proj" for r in "qkvo"}
_GATED = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
_PLAIN = {r: _GATED[r] for r in ("up", "down")}
_SPARSE = ((".block_sparse_moe.", ".mlp."),)
_QWEN = ExpertsRow(normalised="norm_topk_prob")


def _shared(path: str) -> dict[str, str]:
    """A feed-forward that every token reaches beside its experts."""
    return {f"shared.{r}": f"mlp.{path}.{r}_proj" for r in MLP}


def _latent(model_type: str, classes: tuple[str, str, str], experts: ExpertsRow) -> Family:
    """DeepSeek's: attention on latents, which no solver cuts; the first blocks' feed-forwards are dense."""
    names = {"q": "q_proj", "q_a": "q_a_proj", "q_b": "q_b_proj", "kv_a": "kv_a_proj_with_mqa", "kv_b": "kv_b_proj"}
    attention = {f"latent.{r}": f"self_attn.{n}" for r, n in (names | {"o": "o_proj"}).items()}
    return Family(
        model_type,
        classes,
        dict(_GATED),
        others=attention | _shared("shared_experts"),
        cached=("latent.kv_a",),
        experts=experts,
    )


def _classes(stem: str, config: str = "Config") -> tuple[str, str, str]:
    return f"{stem}{config}", f"{stem}Model", f"{stem}ForCausalLM"


def _sandwich(model_type: str, classes: tuple[str, str, str], qk_norm: str = "") -> Family:
    """A gemma that normalises what each submodule adds as well as what it reads."""
    return Family(
        model_type,
        classes,
        _ATTENTION | _GATED,
        qk_norm=qk_norm,
        attention_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
        window=True,
        softcap=True,
        norm_offset=1.0,
    )


def _post_norm(model_type: str, classes: tuple[str, str, str], qk_norm: str = "width", window: bool = False) -> Family:
    """A family that normalises what each submodule adds, not what it reads."""
    return Family(
        model_type,
        classes,
        _ATTENTION | _GATED,
        attention_norm=None,
        attention_post_norm="post_attention_layernorm",
        mlp_norm=None,
        mlp_post_norm="post_feedforward_layernorm",
        qk_norm=qk_norm,
        window=window,
    )


_ROWS = (
    Family("llama", _classes("Llama"), _ATTENTION | _GATED),
    Family("arcee", _classes("Arcee"), _ATTENTION | _PLAIN),
    Family("granite", _classes("Granite"), _ATTENTION | _GATED, factor="residual_multiplier"),
    Family("mistral", _classes("Mistral"), _ATTENTION | _GATED, window=True),
    Family("qwen2", _classes("Qwen2"), _ATTENTION | _GATED, window=True),
    Family("seed_oss", _classes("SeedOss"), _ATTENTION | _GATED),
    Family("gemma", _classes("Gemma"), _ATTENTION | _GATED, norm_offset=1.0),
    Family(
        "hunyuan_v1_dense",
        _classes("HunYuanDenseV1"),
        _ATTENTION | _GATED,
        qk_norm="rotated",
        norms=("query_layernorm", "key_layernorm"),
    ),
    _post_norm("olmo2", _classes("Olmo2")),
    _post_norm("olmo3", _classes("Olmo3"), window=True),
    Family("ministral3", _classes("Ministral3"), _ATTENTION | _GATED, window=True, position_scale=True),
    _post_norm("exaone4", _classes("Exaone4"), qk_norm="head"),
    Family("olmo", _classes("Olmo"), _ATTENTION | _GATED),
    Family("stablelm", _classes("StableLm"), _ATTENTION | _GATED, parallel=True),
    Family("nemotron", _classes("Nemotron"), _ATTENTION | _PLAIN, norm_offset=1.0),
    Family("starcoder2", _classes("Starcoder2"), _ATTENTION | {"up": "mlp.c_fc", "down": "mlp.c_proj"}, window=True),
    Family("qwen3", _classes("Qwen3"), _ATTENTION | _GATED, qk_norm="head", window=True),
    Family("qwen3_moe", _classes("Qwen3Moe"), _ATTENTION | _GATED, qk_norm="head", window=True, experts=_QWEN),
    Family(
        "qwen2_moe",
        _classes("Qwen2Moe"),
        _ATTENTION | _GATED,
        others=_shared("shared_expert"),
        experts=_QWEN,
    ),
    Family(
        "mixtral",
        _classes("Mixtral"),
        _ATTENTION,
        window=True,
        intermediate="",
        experts=ExpertsRow(names=("w1", "w3", "w2"), count="num_local_experts", width="intermediate_size"),
        renames=_SPARSE,
    ),
    Family(
        "olmoe",
        _classes("Olmoe"),
        _ATTENTION,
        qk_norm="width",
        intermediate="",
        experts=ExpertsRow(width="intermediate_size", normalised="norm_topk_prob"),
    ),
    Family(
        "glm4_moe",
        _classes("Glm4Moe"),
        _ATTENTION | _GATED,
        qk_norm="head",
        others=_shared("shared_experts"),
        experts=ExpertsRow(
            count="n_routed_experts",
            router=("mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
            normalised="norm_topk_prob",
            otherwise="apart",
            shared="n_shared_experts",
        ),
    ),
    _latent(
        "deepseek_v2",
        _classes("DeepseekV2"),
        ExpertsRow(count="n_routed_experts", normalised=None, shared="n_shared_experts"),
    ),
    _latent(
        "deepseek_v3",
        _classes("DeepseekV3"),
        ExpertsRow(
            count="n_routed_experts",
            router=("mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
            normalised="norm_topk_prob",
            otherwise="apart",
            shared="n_shared_experts",
        ),
    ),
    Family(
        "minimax_m2",
        _classes("MiniMaxM2"),
        _ATTENTION,
        qk_norm="width",
        intermediate="",
        experts=ExpertsRow(
            names=("w1", "w3", "w2"),
            count="num_local_experts",
            width="intermediate_size",
            router=("mlp.gate.weight", "mlp.e_score_correction_bias"),
        ),
        renames=_SPARSE,
    ),
    Family(
        "granitemoe",
        _classes("GraniteMoe"),
        _ATTENTION,
        mlp="block_sparse_moe",
        factor="residual_multiplier",
        intermediate="",
        experts=ExpertsRow(
            path="block_sparse_moe.experts",
            count="num_local_experts",
            width="intermediate_size",
            router=("block_sparse_moe.router.weight",),
            stacked=True,
        ),
        renames=(
            (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.experts.gate_up_proj"),
            (".block_sparse_moe.output_linear.weight", ".block_sparse_moe.experts.down_proj"),
            (".block_sparse_moe.router.layer.", ".block_sparse_moe.router."),
        ),
    ),
    Family(
        "phimoe",
        _classes("Phimoe"),
        _ATTENTION,
        intermediate="",
        experts=ExpertsRow(
            names=("w1", "w3", "w2"),
            count="num_local_experts",
            width="intermediate_size",
            router=("mlp.router.weight",),
            normalised=None,
            otherwise="apart",
        ),
        renames=((".block_sparse_moe.gate.", ".mlp.router."), *_SPARSE),
    ),
    Family(
        "phi3",
        _classes("Phi3"),
        {"o": "self_attn.o_proj", "down": "mlp.down_proj"},
        fused=(Fused("self_attn.qkv_proj", ("q", "k", "v")), Fused("mlp.gate_up_proj", ("gate", "up"))),
        window=True,
    ),
    _sandwich("gemma2", _classes("Gemma2")),
    _sandwich("gemma3_text", ("Gemma3TextConfig", "Gemma3TextModel", "Gemma3ForCausalLM"), qk_norm="head"),
    Family(
        "opt",
        _classes("OPT"),
        {r: f"self_attn.{r}_proj" for r in "qkv"} | {"o": "self_attn.out_proj", "up": "fc1", "down": "fc2"},
        blocks="model.decoder.layers",
        mlp=None,
        activation="activation_fn",
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        rotary=False,
        intermediate="ffn_dim",
    ),
    Family(
        "gpt_neox",
        _classes("GPTNeoX"),
        {"o": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"},
        fused=(Fused("attention.query_key_value", ("q", "k", "v"), "heads"),),
        blocks="gpt_neox.layers",
        attention="attention",
        parallel=True,
        head="embed_out",
    ),
    Family(
        "gpt2",
        ("GPT2Config", "GPT2Model", "GPT2LMHeadModel"),
        {"o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
        fused=(Fused("attn.c_attn", ("q", "k", "v")),),
        blocks="transformer.h",
        attention="attn",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        rotary=False,
        conv1d=True,
        intermediate="n_inner",
    ),
    Family(
        "mpt",
        _classes("Mpt"),
        {"o": "attn.out_proj", "up": "ffn.up_proj", "down": "ffn.down_proj"},
        fused=(Fused("attn.Wqkv", ("q", "k", "v")),),
        blocks="transformer.blocks",
        attention="attn",
        mlp=None,  # its MLP adds the residual itself
        activation="ffn.act",
        attention_norm="norm_1",
        mlp_norm="norm_2",
        rotary=False,
        tuples=True,
        intermediate="",
    ),
)

FAMILIES: dict[str, Family] = {f.model_type: f for f in _ROWS}
