"""What a block is made of, and its parts replaced. (This file travels with compressed models.)

A block's `spec` is JSON; `install` builds empty modules from it, for compressing and loading alike:

    {"linears": {role: {"kind": "dense", "out": 8, "in": 16} | {"kind": "pair" | "pivoted", "rank": 4}},
     "attention": {"kind": "own", "qk": 64, "v": 48, "pairs": 30} | {…, "k_rank": 96, "k_groups": 1, "k_form": "frequency"}
                 | {"kind": "bypass", "rank": 8, ...},
     "mlp": {"kind": "bypass", "rank": 0, ...},
     "experts": {"kind": "kept", "number": 48, "top": 8},
     "slice": {"in": 48, "mid": 48, "out": 64}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from .attentions import Attention, Frequencies, Latent
from .canonical import count_experts, has_module, join_block, keep_experts, split_block, split_experts
from .families import ATTENTION, FAMILIES, MLP, Family
from .heads import count_heads
from .modules import Bypass, HeadPair, Pair, Pivoted, SlicedBlock, Spec, list_matrices, make_apart, set_module


@dataclass(frozen=True)
class Group:
    """Linears of a block that belong together: role → path in the canonical block."""

    name: str  # "attention", "mlp", "expert.17", or another that the family has: "shared", "mixer"
    linears: Mapping[str, str]


@dataclass(frozen=True)
class Norm:
    """A norm that scales channels by `offset` + its weight, and what it puts out is read by these roles and by nothing else."""

    path: str
    roles: tuple[str, ...]
    offset: float = 0.0


@dataclass(frozen=True)
class Layout:
    """What one block is made of. Blocks of one model may differ."""

    groups: tuple[Group, ...]
    rest: tuple[str, ...] = ()  # parameters of two or more axes that belong to no group: a router, a convolution
    parallel: bool = False  # attention and MLP read the same residual
    factor: float = 1.0  # what a submodule gives is multiplied by this before it is added
    norms: tuple[Norm, ...] = ()  # those whose channels may be rescaled together with what reads them
    heads: int = 0
    kv_heads: int = 0
    fixed: tuple[str, ...] = ()  # see `Family.fixed`

    def has(self, group: str) -> bool:
        return any(g.name == group for g in self.groups)


def get_linear(block: nn.Module, family: Family, role: str) -> nn.Module:
    """A role's module in a canonical block, wherever an edit has moved it."""
    return block.get_submodule(find_path(block, family, role))


def find_path(block: nn.Module, family: Family, role: str) -> str:
    """Where a role's module is in a canonical block, wherever an edit has moved it."""
    own = role.removeprefix("attention.")
    if (role in ATTENTION or own != role) and isinstance(block.get_submodule(family.attention), Attention):
        return f"{family.attention}.{own}_proj"
    return family.path(role)


def has_linear(block: nn.Module, family: Family, role: str) -> bool:
    try:
        return get_linear(block, family, role) is not None
    except (AttributeError, KeyError):
        return False


def read_layout(block: nn.Module, family: Family, config) -> Layout:
    """What a canonical stock block is made of: of the groups that its family knows those that it has, in a fixed order."""
    groups: dict[str, Sequence[str]] = {"attention": ATTENTION, "mlp": MLP}
    for role in family.others:
        name = role.rpartition(".")[0]
        groups[name] = [*groups.get(name, ()), role]
    if family.experts is not None and has_module(block, family.experts.path):
        roles = family.experts.roles
        groups |= {f"expert.{n}": [f"expert.{n}.{r}" for r in roles] for n in range(count_experts(block, family))}
    found = {
        n: {r: find_path(block, family, r) for r in roles if has_linear(block, family, r)}
        for n, roles in groups.items()
    }
    known = {f"{path}.weight" for linears in found.values() for path in linears.values()}
    parallel = family.parallel and bool(getattr(config, "use_parallel_residual", True))
    heads, kv_heads = count_heads(config, block.get_submodule(family.attention)) if found["attention"] else (0, 0)
    return Layout(
        tuple(Group(name, linears) for name, linears in found.items() if linears),
        tuple(n for n in list_matrices(block) if n not in known),
        parallel,
        read_factor(block, family),
        list_norms(block, family, {n for n, linears in found.items() if linears}),
        heads,
        kv_heads,
        family.fixed,
    )


def list_norms(block: nn.Module, family: Family, groups: set[str]) -> tuple[Norm, ...]:
    """Norms of a block with these groups that nothing but linears of its attention or its dense feed-forward reads."""
    others = {g for g in groups if not g.startswith("expert.")} - {"attention", "mlp", "shared"}
    norms = dict[str, str]()
    attention_norm, mlp_norm = find_norms(block, family)
    if "attention" in groups and not others:
        norms["attention"] = attention_norm or ""
    if "mlp" in groups and groups <= {"attention", "mlp"}:
        norms["mlp"] = mlp_norm or ""
    readers = (*ATTENTION[:3], *(r for r in family.others if r.startswith("attention.")))
    readers = tuple(r for r in readers if has_linear(block, family, r))
    roles = {"attention": readers, "mlp": tuple(r for r in MLP[:2] if r in family.roles)}
    if attention_norm and attention_norm == mlp_norm:  # both read one
        roles = {"attention": roles["attention"] + roles["mlp"]} if norms.keys() == roles.keys() else {}
    found = {norms[g]: own for g, own in roles.items() if norms.get(g) and has_module(block, norms[g])}
    return tuple(Norm(path, own, family.norm_offset) for path, own in found.items())


def read_factor(block: nn.Module, family: Family) -> float:
    """What attention and MLP give is multiplied by this before it is added to the residual stream."""
    return float(getattr(block, family.factor)) if family.factor else 1.0


def has_mixer(block: nn.Module, family: Family) -> bool:
    """Whether a block has a mixer, in place of attention or beside it."""
    return any(role.startswith("mixer.") and has_module(block, path) for role, path in family.others.items())


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
    form = spec.get("attention", {})
    stock = block.get_submodule(family.attention) if form else block
    experts = spec.get("experts")
    if experts and count_experts(block, family) > experts["number"]:
        keep_experts(block, family, range(experts["number"]), experts["top"])
    roles = (*family.roles, *family.others)
    linears = {r: get_linear(block, family, r) for r in roles if has_linear(block, family, r)}
    for role, f in spec.get("linears", {}).items():
        linears[role] = build_linear(f, get_linear(block, family, role))
        set_module(block, family.path(role), linears[role])
        parent = block.get_submodule(family.path(role).rpartition(".")[0])
        parent._is_hf_initialized = True  # type: ignore[assignment]  # GPT-2's way to start an MLP asks factors for `weight`
    if form.get("kind") == "own":
        if "k_rank" in form:
            kind = Frequencies if form.get("k_form") == "frequency" else Latent
            own = kind(stock, config, family, form["qk"], form["v"], form["k_rank"], form["k_groups"])
        else:
            own = Attention(stock, config, family, form["qk"], form["v"], form.get("pairs"))
        for role in (*ATTENTION, *(r for r in linears if r.startswith("attention."))):
            setattr(own, f"{role.removeprefix('attention.')}_proj", linears[role])
        set_module(block, family.attention, own)
    elif form.get("kind") == "bypass":
        set_module(block, family.attention, _bypass(form, stock, config, as_tuple=True))
    form = spec.get("mlp", {})
    if form.get("kind") == "bypass":
        bypass = _bypass(form, linears["down"], config, as_tuple=False)
        if family.mlp is not None:
            set_module(block, family.mlp, bypass)
        else:
            set_module(block, family.path("up"), bypass)
            set_module(block, family.activation, nn.Identity())
            set_module(block, family.path("down"), nn.Identity())
    drop_norms(block, family, spec)
    join_block(block, family)
    return SlicedBlock(block, family, spec["slice"], config.hidden_size) if "slice" in spec else block


def _bypass(form: Spec, like: nn.Module, config, as_tuple: bool) -> Bypass:
    p, sizes = next(like.parameters()), (config.hidden_size, form["rank"])
    parts = form["gate"], form["shift"], as_tuple, form.get("factored", True)
    return Bypass(*sizes, *parts, device=p.device, dtype=p.dtype)


def find_norms(block: nn.Module, family: Family) -> tuple[str | None, str | None]:
    """Paths of the norms before attention and before the feed-forward; one path twice where one serves both."""
    if family.shared_norm and not (family.mlp_norm and has_module(block, family.mlp_norm)):
        return family.shared_norm, family.shared_norm
    return family.attention_norm, family.mlp_norm


def drop_norms(block: nn.Module, family: Family, spec: Spec) -> None:
    """Norms that nothing reads go, in place: those of bypassed submodules, before them where they read the stream itself.

    A norm that the other submodule shares stays, and the bypass reads past it.
    """
    gone = [n for n in ("attention", "mlp") if spec.get(n, {}).get("kind") == "bypass"]
    first = dict(zip(("attention", "mlp"), find_norms(block, family), strict=True))
    last = {"attention": family.attention_post_norm, "mlp": family.mlp_post_norm}
    raw = [n for n in gone if spec[n]["raw"]]
    shared = first["attention"] if first["attention"] == first["mlp"] and len(raw) == 1 else None
    for path in {last[n] for n in gone} | {first[n] for n in raw} - {shared, None}:
        if path is not None:
            set_module(block, path, nn.Identity())
    if shared and (spec[raw[0]]["rank"] or spec[raw[0]]["gate"]):
        block.__class__ = make_apart(type(block))  # type: ignore[assignment, arg-type]
        block.apart, block.tuples = raw[0], family.tuples  # type: ignore[assignment]
        block.paths = (shared, family.attention, family.mlp)  # type: ignore[assignment]


def install_model(model: nn.Module, config) -> None:
    """Install every block's spec in a base model or causal LM, and number the attentions that are left densely."""
    family = FAMILIES[config.planish["family"]]
    blocks = find_blocks(model, family)
    gone = 0
    for i, block in enumerate(blocks):
        if family.experts is not None and not family.experts.stacked:
            split_experts(block, family)  # as they are stored
        block = blocks[i] = install(block, config.planish["blocks"][i], family, config)
        attention = block.get_submodule(family.attention) if has_module(block, family.attention) else None
        if isinstance(attention, Bypass):
            gone += 1
        elif attention is not None:
            attention.layer_idx = i - gone


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
