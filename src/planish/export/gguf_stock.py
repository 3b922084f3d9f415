"""Models of every other family that llama.cpp has a graph of (`planish.plan.graphs`), as that graph.

Its blocks are all alike, so low-rank linears are multiplied back, and removed parts, dimensions and neurons return as zeros.
Names are those of the gguf library's own maps; stacked experts are read and written one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from planish.core import Shape
from planish.errors import InputError
from planish.export.dense import make_padded
from planish.export.gguf_architecture import ZERO_WIDTH, read_rope
from planish.export.gguf_blocks import StoredRows
from planish.export.gguf_content import XIELU, Content, Stack
from planish.export.gguf_llama import interleave
from planish.export.gguf_mixers import NORMS, convert_mixer, describe_mixers, weigh_falcon
from planish.export.plain import find_module, plain_block, plain_linear
from planish.folder.skeleton import set_parameter
from planish.folder.source import FolderSource
from planish.modelling.blocks import find_blocks, find_path
from planish.modelling.family import MLP, ExpertsRow
from planish.modelling.modules import Fused
from planish.plan.graphs import GRAPHS, Graph, describe_rope, split_rope

EPSILON = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
EXPERTS = dict(zip(MLP, ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), strict=True))
ROUTER = {"weight": "ffn_gate_inp.weight", "bias": "ffn_gate_inp.bias", "e_score_correction_bias": "exp_probs_b.bias"}


class Stock:
    """A model as one graph. `blocks`: those of which something is left."""

    def __init__(self, source: FolderSource, graph: Graph):
        import gguf

        self.source, self.graph, self.family = source, graph, source.family
        plains = [plain_block(source, i, experts=False) for i in range(source.n_blocks)]
        self.blocks = [i for i, p in enumerate(plains) if not p.attention == p.mlp == "none"]
        if not self.blocks:
            raise InputError(f"nothing is left of any block of {source.folder}")
        kinds = getattr(source.config, "layer_types", None) or []
        sliding = {i for i, kind in enumerate(kinds) if kind == "sliding_attention"}
        if graph.still or graph.open or graph.mixer or (graph.windows and sliding and not sliding & {*self.blocks}):
            self.blocks = list(range(source.n_blocks))  # which blocks rotate, or that one has a window, is built in
            self.check_still()
        self.width = max(p.width for p in plains)
        self.widths = [self.width] * len(plains)
        if graph.widths:
            self.widths = [0 if p.mlp == "other" else p.width or ZERO_WIDTH for p in plains]
        self.back = sum(p.extra for p in plains)
        self.experts = self.measure_experts()
        self.name = graph.mixed if graph.mixed and self.experts[0] else graph.name
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        self.names = gguf.get_tensor_name_map(kinds[self.name], source.n_blocks)

    def check_still(self) -> None:
        """InputError unless those blocks rotate that the graph rotates, and those have a window that have one there."""
        for i in self.blocks if self.graph.still else ():
            attention = find_blocks(self.source.empty, self.family)[i].get_submodule(self.family.attention)
            if bool(getattr(attention, self.family.rotates)) != bool((i + 1) % self.graph.still):
                raise InputError(
                    f"llama.cpp's graph {self.graph.name} rotates all blocks but every {self.graph.still}th; "
                    f"block {i} does otherwise"
                )
        for i in self.blocks if self.graph.open else ():
            if (self.source.config.layer_types[i] == "sliding_attention") != bool((i + 1) % self.graph.open):
                raise InputError(
                    f"llama.cpp's graph {self.graph.name} has windows in all blocks but every {self.graph.open}th; "
                    f"block {i} does otherwise"
                )

    def measure_experts(self) -> tuple[int, int]:
        """(Experts in a block, their neurons) as they are written; (0, 0) without any."""
        row = self.family.experts
        if row is None:
            return 0, 0
        sizes, narrow = set[int](), 0
        for i in self.blocks:
            experts = find_module(find_blocks(self.source.model, self.family)[i], row.path)
            if experts is None:
                continue
            sizes.add(len(experts.numbers))
            narrow = max(narrow, *(experts.linears(n)[-1].in_features for n in experts.numbers))
        if len(sizes) > 1:
            raise InputError(
                f"blocks keep {' and '.join(map(str, sorted(sizes)))} experts; llama.cpp's graphs have one number"
            )
        if shared := self.read_shared():  # its width is a multiple of theirs
            narrow = shared if row.bound else next(n for n in range(narrow, shared + 1) if shared % n == 0)
        return (sizes or {0}).pop(), narrow

    def read_shared(self) -> int:
        """Neurons of the feed-forward that every token reaches beside its experts, where the graph counts them in experts."""
        row = self.family.experts
        shapes = (self.source.shape(i) for i in self.blocks) if row and (row.shared or row.bound) else ()
        return next((n for s in shapes for role, n, _ in s.others if role == "shared.up"), 0)

    def rename(self, name: str) -> str:
        """The file's name of a tensor of the canonical model."""
        found = self.names.get_name(name, (".weight", ".bias"))
        if found is None:
            found = self.names.get_name(self.family.store_name(name), (".weight", ".bias"))
        if found is None:
            raise InputError(f"llama.cpp's graph {self.name} has no place for {name}")
        return f"{found}.weight" if name.endswith("layer_scalar") else str(found)

    def tensors(self, known: StoredRows) -> Iterator[tuple[str, Tensor | Stack]]:
        known.open(None)
        outside = self.source.outside()
        if self.graph.weighed and self.source.config.tie_word_embeddings:  # each has a factor of its own
            outside["lm_head.weight"] = outside["model.embed_tokens.weight"]
        for name, tensor in outside.items():
            yield self.rename(name), self.shift(name, tensor)
        if split_rope(self.source.config)[0].get("rope_type") == "llama3":
            rope = read_rope(self.source)
            yield "rope_freqs.weight", rope.factors[: rope.width // 2]
        elif self.graph.proportional:
            yield "rope_freqs.weight", read_proportions(self.source)
        for slot, i in enumerate(self.blocks):
            known.open(i)
            block, _ = make_padded(self.source, plain_block(self.source, i, experts=False), self.widths[i])
            place = f"{self.family.blocks}.{slot}."
            for stored, whole in join_fused(block):
                for name, tensor in convert_mixer(self.source.config, self.graph.mixer, stored, whole):
                    yield from self.convert(name, f"{place}{name}", tensor)
            yield from self.stacks(block, i, slot, known)

    def convert(self, name: str, full: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """One tensor of a block."""
        slot = full.removeprefix(f"{self.family.blocks}.").partition(".")[0]
        row = self.family.experts
        if (row is not None and name.startswith(f"{row.path}.")) or ".act_fn." in name:
            return
        if row is not None and name in row.router:
            yield f"blk.{slot}.{ROUTER[name.rpartition('.')[2]]}", tensor
        elif self.family.sinks and name == f"{self.family.attention}.{self.family.sinks}":
            yield f"blk.{slot}.attn_sinks.weight", tensor
        elif self.graph.beside and name.startswith(f"{self.graph.beside}."):
            yield from split_shared(name, slot, tensor, bool(self.experts[0]))
        elif name.endswith("kv_b_proj.weight"):
            yield from split_latent(self.source.config, slot, tensor)
        else:
            yield self.rename(full), self.shift(name, self.turn(name, tensor))

    def turn(self, name: str, tensor: Tensor) -> Tensor:
        """Queries and keys with their rotated channels where the graph looks for them."""
        shape = next((s for s in map(self.source.shape, self.blocks) if s.heads), None)
        if shape is None or not (self.graph.neighbours and shape.rotary):
            return tensor
        alone = {f.roles[0]: f.path for f in self.family.fused if len(f.roles) == 1} | self.family.linears
        heads = {alone.get("q"): shape.heads, alone.get("k"): shape.kv_heads}
        stem = name.rpartition(".")[0]
        return interleave(tensor, heads[stem], shape.rotary) if stem in heads else tensor

    def shift(self, name: str, tensor: Tensor) -> Tensor:
        """Norms that scale by an offset + their weight, with the sum; linears with a factor, with the product."""
        if self.graph.weighed:
            return weigh_falcon(self.source.config, name, tensor)
        shifted = self.family.norm_offset and name.endswith("norm.weight") and name not in NORMS
        return tensor.float() + self.family.norm_offset if shifted else tensor

    def stacks(self, block: nn.Module, i: int, slot: int, known: StoredRows) -> Iterator[tuple[str, Tensor | Stack]]:
        row = self.family.experts
        if row is None or find_module(block, row.path) is None:
            return
        (number, width), hidden = self.experts, row.reads(self.source.config)
        for role, name in ((r, EXPERTS[r]) for r in row.roles):
            shape = (hidden, width) if role == "down" else (width, hidden)
            matrices = (self.read_expert(i, n, role, shape, known) for n in range(number))
            yield f"blk.{slot}.{name}.weight", Stack(number, shape, matrices)
            if self.graph.biased:
                yield f"blk.{slot}.{name}.bias", read_biases(self.source, i, role, (number, shape[0]))

    def read_expert(self, i: int, number: int, role: str, shape: tuple[int, int], known: StoredRows) -> Tensor:
        """One linear of one expert, filled up with zeros."""
        block = find_blocks(self.source.model, self.family)[i]
        path = find_path(block, self.family, f"expert.{number}.{role}")
        module = copy.deepcopy(block.get_submodule(path))
        for name in module.state_dict():
            set_parameter(module, name, self.source.reader.tensor(f"{self.family.blocks}.{i}.{path}.{name}"))
        known.open(i, path)
        weight, bias = plain_linear(module)
        if bias is not None and not self.graph.biased:
            raise InputError(f"{path} of block {i} has a bias, and llama.cpp's graph {self.graph.name} has none there")
        return nn.functional.pad(weight, (0, shape[1] - weight.shape[1], 0, shape[0] - weight.shape[0]))

    def values(self) -> dict[str, Any]:
        """Metadata."""
        config, family, (number, width) = self.source.config, self.family, self.experts
        shapes = [self.source.shape(i) for i in self.blocks]
        epsilon = next((float(getattr(config, n)) for n in EPSILON if getattr(config, n, None) is not None), 1e-5)
        found: dict[str, Any] = {"block_count": len(self.blocks), "feed_forward_length": self.width or width}
        found |= {"attention.head_count": config.num_attention_heads, "attention.layer_norm_epsilon": epsilon}
        found |= {"attention.layer_norm_rms_epsilon": epsilon}
        if shape := next((s for s in shapes if s.heads), None):
            found |= {"attention.head_count_kv": shape.kv_heads, "attention.key_length": shape.qk}
            found |= {"attention.value_length": shape.v, "rope.dimension_count": shape.rotary}
        else:
            found |= describe_latent(config)
        found |= describe_blocks(self, shapes)
        if family.rotary:
            found |= describe_rope(config)
        if number and family.experts:
            top = min(getattr(config, family.experts.top), number)
            found |= {"expert_count": number, "expert_used_count": top, "expert_feed_forward_length": width}
            found |= describe_routing(config, family.experts, self.read_shared() // width, self.graph)
        if self.graph.windows:
            sliding = [config.layer_types[i] == "sliding_attention" for i in self.blocks]
            if any(sliding):  # the graphs refuse a window that no block has
                found |= {"attention.sliding_window": config.sliding_window}
                found |= {"attention.sliding_window_pattern": sliding}
        if "xielu" in self.graph.activation:
            found |= self.read_activations()
        named = {key: read_named(config, name) for key, name in self.graph.values.items()}
        return found | {k: v for k, v in named.items() if v is not None} | dict(self.graph.fixed)

    def read_activations(self) -> dict[str, list[float]]:
        """The numbers that every block's activation has of its own."""
        place = [f"{self.family.blocks}.{i}.mlp.act_fn." for i in self.blocks]
        reader = self.source.reader
        return {  # of a removed feed-forward, which is zeros, they do not matter
            f"{XIELU}{n}": [float(reader.tensor(f"{p}{n}")) if f"{p}{n}" in reader else 0.0 for p in place]
            for n in ("alpha_p", "alpha_n", "beta", "eps")
        }


def lay_out(source: FolderSource, forced: str | None) -> Content:
    """What a file of the family's graph holds."""
    kind = source.family.model_type
    graph = GRAPHS[kind]
    if forced not in (None, graph.name):
        raise InputError(f"{kind} can be written as {graph.name}; got {forced!r}")
    stock = Stock(source, graph)
    return Content(stock.name, stock.values(), stock.tensors, stock.back)


def describe_blocks(stock: Stock, shapes: list[Shape]) -> dict[str, Any]:
    """What a graph asks of every block on its own."""
    config, found = stock.source.config, dict[str, Any]()
    number, width = stock.experts
    if stock.graph.widths:
        found["feed_forward_length"] = [
            stock.widths[i] or (width if s.experts else 0) for i, s in zip(stock.blocks, shapes, strict=True)
        ]
    elif stock.graph.beside and number:
        found |= {"feed_forward_length": width, "expert_shared_feed_forward_length": stock.width}
    kv_heads = [s.kv_heads for s in shapes]
    if stock.graph.mixer in ("conv", "mamba") and 0 in kv_heads:
        found["attention.head_count_kv"] = kv_heads
    elif stock.family.per_block:
        found |= describe_kinds(shapes, config.layer_types)
    if stock.graph.mixer:
        found |= describe_mixers(config, stock.graph.mixer, [s.heads > 0 for s in shapes])
    if stock.family.rotates_where:
        name, value = stock.family.rotates_where
        found["rope.scaling.finetuned"] = getattr(config, name) == value
    if stock.family.mrope:
        sections = split_rope(config)[0].get("mrope_section", [11, 11, 10])
        pairs = max(s.rotary for s in shapes) // 2
        turns = sections if sum(sections) == pairs else [(pairs + 2 - n) // 3 for n in range(3)]  # time, height, width
        found["rope.dimension_sections"] = [*turns, 0]
    return found


def split_shared(name: str, slot: str, tensor: Tensor, mixed: bool) -> Iterator[tuple[str, Tensor]]:
    """The dense feed-forward of a granite hybrid, which is the shared one where there are experts."""
    roles = ("gate", "up") if "input_linear" in name else ("down",)
    for role, part in zip(roles, tensor.chunk(len(roles)), strict=True):
        yield f"blk.{slot}.ffn_{role}{'_shexp' if mixed else ''}.weight", part


def read_proportions(source: FolderSource) -> Tensor:
    """Factors of the frequencies in full attention, of which the last ones may be none."""
    full, kinds = split_rope(source.config)[0], source.config.layer_types
    half = source.shape(kinds.index("full_attention")).qk // 2
    kept = int(full.get("partial_rotary_factor", 1.0) * half) if full.get("rope_type") == "proportional" else half
    return torch.tensor([1.0] * kept + [1e30] * (half - kept))


def describe_kinds(shapes: list[Shape], kinds: list[str]) -> dict[str, Any]:
    """Heads and their sizes in full attention and in windows; blocks that read others' keys have the others' heads."""
    own = {
        kind: [s for s, k in zip(shapes, kinds, strict=True) if k == kind] or shapes
        for kind in set(kinds) | {"full_attention"}
    }
    heads = {kind: max(s.kv_heads for s in those) for kind, those in own.items()}
    full, window = own["full_attention"][0], own.get("sliding_attention", shapes)[0]
    found: dict[str, Any] = {"attention.head_count_kv": [heads[kind] for kind in kinds]}
    for end, shape in (("", full), ("_swa", window)):
        found |= {f"attention.{part}_length{end}": shape.qk for part in ("key", "value")}
        found[f"rope.dimension_count{end}"] = shape.qk
    return found


def describe_routing(config: Any, row: ExpertsRow, shared: int, graph: Graph) -> dict[str, Any]:
    found: dict[str, Any] = {"expert_gating_func": graph.gates} if graph.gates else {}
    groups = getattr(config, row.groups, None) or 1
    if groups > 1:
        found |= {"expert_group_count": groups, "expert_group_used_count": getattr(config, row.top_groups)}
    names = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
    own = next((n for n in (getattr(config, name, None) for name in names) if n), None)
    latent = getattr(config, row.hidden, None) if row.hidden else None
    found |= {"moe_latent_size": latent} if latent else {}
    found |= {"expert_shared_count": shared} if shared else {}
    return found | ({"expert_shared_feed_forward_length": own} if own else {})


def read_biases(source: FolderSource, i: int, role: str, shape: tuple[int, int]) -> Tensor:
    """Biases (experts, out) of this linear of all experts of a block, filled up with zeros."""
    block, found = find_blocks(source.model, source.family)[i], []
    for number in range(shape[0]):
        path = find_path(block, source.family, f"expert.{number}.{role}")
        name = next(n for n in block.get_submodule(path).state_dict() if n.endswith("bias"))
        bias = source.reader.tensor(f"{source.family.blocks}.{i}.{path}.{name}")
        found.append(nn.functional.pad(bias, (0, shape[1] - len(bias))))
    return torch.stack(found)


def split_latent(config: Any, slot: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Keys and values of all heads from the latent: (latent, keys) and (values, latent) per head."""
    parts = tensor.unflatten(0, (config.num_attention_heads, -1)).split([config.qk_nope_head_dim, config.v_head_dim], 1)
    yield f"blk.{slot}.attn_k_b.weight", parts[0].transpose(1, 2).contiguous()
    yield f"blk.{slot}.attn_v_b.weight", parts[1].contiguous()


def describe_latent(config: Any) -> dict[str, Any]:
    """DeepSeek's attention on latents, which llama.cpp runs as one head of keys that are the latents themselves."""
    keys, values = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    found = {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": keys,
        "attention.value_length_mla": values,
        "rope.dimension_count": config.qk_rope_head_dim,
    }
    return found | ({"attention.q_lora_rank": config.q_lora_rank} if config.q_lora_rank else {})


def read_named(config: Any, name: str) -> Any:
    """A value of a configuration, inside another one's where the name has a dot; None where there is none."""
    for part in name.split("."):
        config = config.get(part) if isinstance(config, dict) else getattr(config, part, None)
    return float(config) if isinstance(config, int) and "bias" in name else config


def join_fused(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A canonical block's tensors, fused linears whole: q above k above v, gate above up."""
    joined = {name: m for name, m in block.named_modules() if isinstance(m, Fused)}
    for name, tensor in block.state_dict().items():
        if not any(name.startswith(f"{path}.") for path in joined):
            yield name, tensor
    for path, fused in joined.items():
        if "gate" in fused.roles and "q" in fused.roles:  # head by head, as transformers has it
            weight, bias = fused.join()
            yield f"{path}.weight", weight
            if bias is not None:
                yield f"{path}.bias", bias
            continue
        parts = [getattr(fused, role) for role in fused.roles]
        yield f"{path}.weight", torch.cat([p.weight.data for p in parts])
        if parts[0].bias is not None:
            yield f"{path}.bias", torch.cat([p.bias.data for p in parts])
