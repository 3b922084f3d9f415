"""Tensors seen at the sites of taps while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from planish.calibrate.text import list_aside
from planish.modelling.blocks import find_norms, get_linear, read_factor
from planish.modelling.canonical import find_mixture, has_module
from planish.modelling.experts import read_top, set_top
from planish.modelling.families import ExpertsRow, Family
from planish.stats import Stats, Tap


class Routed(NamedTuple):
    """What is seen where only some tokens come by: their `rows` (n, channels), and of which `windows` (n,) of the batch each is."""

    rows: Tensor
    windows: Tensor

    def cpu(self) -> Routed:
        return Routed(self.rows.cpu(), self.windows.cpu())


Values = dict[str, Any]  # site → Tensor (batch, seq, channels), or Routed


class Seen(dict[str, Tensor]):
    """Site → the tensor as the forward has it: (…, channels), an expert's (tokens that reach it, channels)."""

    length = 0  # tokens of a window
    chosen: Tensor  # (tokens, top): the experts that each token reaches; what further columns hold is not looked at
    weights: Tensor  # (tokens, top): what their outputs are multiplied by
    gates: Tensor | None = None  # (tokens, top): what their inputs are multiplied by, where gates are inside
    top = 0
    norms: Tensor  # (tokens, experts): of what each puts out

    def watch(
        self, block: nn.Module, row: ExpertsRow, sites: set[str], see: Callable[[str, Tensor], None]
    ) -> list[Any]:
        """Hooks that see which expert the tokens of the next forward reach, and what is asked of all experts at once."""
        experts: Any = block.get_submodule(row.path)

        def see_length(module, args, kwargs) -> None:
            self.length = first(args, kwargs).shape[1]

        def see_chosen(module, args, kwargs) -> None:
            _, self.chosen, self.weights = args
            self.top = self.chosen.shape[1]
            if row.inside:
                self.gates, self.weights = self.weights, torch.ones_like(self.weights)

        hooks = ((block, see_length), (experts, see_chosen))
        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
        if "experts.shares" in sites:
            handles += self.watch_shares(block, row, see)
        return handles + self.watch_gates(experts, sites, see)

    def watch_shares(self, block: nn.Module, row: ExpertsRow, see: Callable[[str, Tensor], None]) -> list[Any]:
        """Hooks for "experts.shares" (tokens, experts): what the router gives each expert that a token reaches, before its
        `scale`; minus what it would give the one that comes next if one of these were missing but the others kept theirs; and
        in a softmax over all experts minus what it has of it for the others.

        The one that comes next is called as well, times 0, so that its gradient is what the loss would gain by it. Where gates are
        inside, what is shared is what experts put out then: 1 of each.
        """
        experts: Any = block.get_submodule(row.path)
        router: Any = find_mixture(block, row)[1]
        scale = torch.as_tensor(getattr(router, row.scale) if row.scale else 1.0).detach().expand(len(experts.numbers))
        wider: list[Tensor] = []  # what the router says if a token may reach one expert more, and its logits

        def look_further(module, args, kwargs, out) -> None:
            wider.clear()
            if read_top(module, row) < len(experts.numbers):
                wider.extend(ask_wider(module, row, args, kwargs, out))

        def see_shares(module, args):
            hidden, chosen, gates = args
            each = scale.to(gates)
            each = each.where(each != 0, torch.finfo(gates.dtype).tiny)
            weights = torch.ones_like(gates) if row.inside else gates / each[chosen]
            shares, reached = weights.new_zeros(len(weights), len(experts.numbers)), chosen
            if wider:
                index, given, logits = wider
                given = given / each[index]
                if row.gates(router) == "softmax":
                    shares = -logits.detach().float().softmax(-1).to(weights.dtype)
                new = (index[:, :, None] != chosen[:, None]).all(-1)
                known = given.masked_fill(new, 0).sum(1, keepdim=True).clamp(min=torch.finfo(given.dtype).tiny)
                at = new.int().argmax(1, keepdim=True)
                least = (given * new).gather(1, at) * weights.sum(1, keepdim=True) / known
                if row.inside:
                    gates, least = torch.cat([gates, given.gather(1, at)], dim=1), torch.ones_like(least)
                shares = shares.scatter(1, index.gather(1, at), -least.detach().to(shares.dtype))
                reached = torch.cat([chosen, index.gather(1, at)], dim=1)
            shares = shares.scatter(1, chosen, weights)
            if row.inside and torch.is_grad_enabled():
                shares.requires_grad_()
            see("experts.shares", shares)
            used = shares.gather(1, reached) * each[reached]
            used = torch.cat([used[:, : self.top], used[:, self.top :] - used[:, self.top :].detach()], dim=1)
            self.chosen, self.weights = reached, used
            if row.inside:
                self.gates = gates
                return hidden, reached, gates, used
            return hidden, reached, used

        return [
            router.register_forward_hook(look_further, with_kwargs=True),
            experts.register_forward_pre_hook(see_shares),
        ]

    def watch_gates(self, experts: Any, sites: set[str], see: Callable[[str, Tensor], None]) -> list[Any]:
        """Hooks for what is seen of all experts at once: "experts.out", their sum (tokens, hidden); and, each (tokens, experts)
        and zero where a token does not reach one, "experts.gates", what their outputs are multiplied by, and "experts.norms",
        those outputs' lengths."""

        def see_gates(module, args):
            _, chosen, weights, *shares = args
            weights = weights * shares[0].detach() if shares else weights
            see("experts.gates", weights.new_zeros(len(weights), len(experts.numbers)).scatter(1, chosen, weights))

        def start(module, args) -> None:
            self.norms = args[0].new_zeros(len(args[0]), len(experts.numbers))

        def see_norm(number: int, out: Tensor) -> None:
            token, real = self.find(number)
            length = out.detach()[real].norm(dim=-1)
            if self.gates is not None:  # so that gate times length is that of what the expert adds
                length = length / self.gates[self.chosen == number].detach()[real]
            self.norms[token, number] = length.to(self.norms.dtype)

        hooks = []
        if "experts.out" in sites:
            hooks.append(experts.register_forward_hook(lambda module, args, out: see("experts.out", out)))
        if "experts.gates" in sites:
            hooks.append(experts.register_forward_pre_hook(see_gates))
        if "experts.norms" in sites:
            hooks.append(experts.register_forward_pre_hook(start))
            hooks.append(experts.register_forward_hook(lambda module, args, out: see("experts.norms", self.norms)))
            for n in experts.numbers:
                down = experts.linears(n)[-1]
                hooks.append(down.register_forward_hook(lambda module, args, out, n=n: see_norm(n, out)))
        return hooks

    def find(self, number: int) -> tuple[Tensor, Tensor | slice]:
        """Which tokens reach an expert, and which rows of what it is called on they are."""
        token, slot = torch.where(self.chosen == number)
        real = slot < self.top if self.chosen.shape[1] > self.top else slice(None)
        return token[real], real

    def fold(self, values: Mapping[str, Tensor], batch: int) -> Values:
        """What belongs to these sites, by whatever prefix, as (batch, seq, channels) or `Routed`."""
        found: Values = {}
        for site, value in values.items():
            where, _, rest = site.rpartition(":")[2].partition(".")
            if where == "expert":
                number = int(rest.partition(".")[0])
                token, real = self.find(number)
                gates = self.weights.detach()[:, : self.top][self.chosen[:, : self.top] == number]
                rows = value[real] * gates[:, None] if site.endswith(".gated") else value[real]
                found[site] = Routed(rows, token // self.length)
            else:
                found[site] = value.reshape(batch, -1, value.shape[-1])
        return found


def ask_wider(
    router: Any, row: ExpertsRow, args: Any, kwargs: Any, out: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The experts (tokens, top + 1) that tokens would reach if they might reach one more, what the router gives each, and its
    logits. `out`: what it says as it is."""
    top = read_top(router, row)
    set_top(router, row, top + 1)
    try:
        found = router.forward(*args, **kwargs)
    finally:
        set_top(router, row, top)
    at = [n for n, t in enumerate(out) if t.shape[-1] == top]
    (logits,) = (t for n, t in enumerate(out) if n not in at)
    chosen, given = sorted((found[n] for n in at), key=torch.is_floating_point)
    if chosen.shape[1] == top:  # it knows no other number: the next by its logits, given what the last one is
        after = logits.scatter(1, chosen, -torch.inf).argmax(1, keepdim=True)
        chosen, given = torch.cat([chosen, after], dim=1), torch.cat([given, given[:, -1:]], dim=1)
    return chosen, given, logits


def choose_windows(part: str, first: int, n: int, aside: int = 0) -> Any:
    """Which of a batch's n windows, whose first has the number `first`, belong to a part: every eighth is held out of "fit"; one
    in `aside` of them is "aside" and out of "all"."""
    held, out = torch.arange(first, first + n) % 8 == 7, torch.zeros(n, dtype=torch.bool)
    out[[i - first for i in list_aside(first, first + n, aside)]] = True
    return {"all": ~out if out.any() else slice(None), "fit": ~held, "held": held, "aside": out}[part]


def take_windows(value: Tensor | Routed, chosen: Tensor | slice) -> Tensor:
    """Those of some windows of the batch: a mask (batch,), or all of them."""
    if isinstance(value, Routed):
        return value.rows[chosen[value.windows.cpu()] if isinstance(chosen, Tensor) else chosen]
    return value[chosen]


def add_batch(stats: Stats, taps: list[Tap], values: Values, first: int, n: int, aside: int = 0) -> None:
    """Add a batch of n windows, whose first has the number `first`; one in `aside` is out of "all". Grams are to be completed."""
    for part in sorted({t.part for t in taps}):
        chosen = choose_windows(part, first, n, aside)
        if isinstance(chosen, slice) or chosen.any():
            own = [t for t in taps if t.part == part]
            sites = {s for t in own for s in t.sites}
            some = {s: take_windows(v, chosen) for s, v in values.items() if s in sites}
            stats.update(some, own, whole=False)


def first(args, kwargs) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def find_gap(where: str, values: dict[str, Tensor], parallel: bool) -> Tensor:
    """What a submodule would have to add to the residual stream for the sum to be the uncompressed model's.

    Where both submodules read the same residual, attention aims at its uncompressed self and the feed-forward at the sum.
    """
    v = {s: t.reshape(values["attention.raw"].shape) for s, t in values.items() if s.endswith((".raw", ".add"))}
    if parallel and where == "attention":
        return v["dense:attention.add"]
    if parallel:
        total = v["dense:mlp.raw"] + v["dense:attention.add"] + v["dense:mlp.add"]
        return total - v["mlp.raw"] - v["attention.add"]
    return v[f"dense:{where}.raw"] + v[f"dense:{where}.add"] - v[f"{where}.raw"]


def find_end(block: nn.Module, family: Family, where: str, end: str) -> nn.Module:
    """The module that reads the residual stream for a submodule ("raw"), or gives what is added to it ("add")."""
    attention_norm, mlp_norm = find_norms(block, family)
    if where == "attention":
        first, own, last = attention_norm, family.attention, family.attention_post_norm
    else:
        first, own, last = mlp_norm, family.mlp or "", family.mlp_post_norm
    return block.get_submodule(first or own if end == "raw" else last or own or family.path("down"))


def tap_added(module: nn.Module, factor: float, see: Callable[[Tensor], None]) -> Any:
    """A hook that sees what is added to the residual stream; gradients reach it through what the block goes on with."""

    def look(module, args, out):
        first, *rest = out if isinstance(out, tuple) else (out,)
        added = first if factor == 1 else first * factor
        see(added)
        if factor == 1:
            return None
        return (added / factor, *rest) if isinstance(out, tuple) else added / factor

    return module.register_forward_hook(look)


def copy_added(block: nn.Module, family: Family) -> list[Any]:
    """A last hook that gives the block a copy of what its feed-forward adds, where it would change what others have seen."""
    if not family.in_place or not has_module(block, family.mlp or ""):
        return []
    return [block.get_submodule(family.mlp or "").register_forward_hook(lambda module, args, out: out.clone())]


class AllSeen(Exception):
    """Ends a forward pass whose sites have all been seen."""


@contextmanager
def tap_sites(block: nn.Module, family: Family, sites: set[str], stop: bool = False) -> Iterator[Seen]:
    """Within the context a forward of the block fills the yielded dict with the tensors at these sites.

    `stop`: the forward ends with `AllSeen` as soon as it has them all.
    """
    seen, handles = Seen(), list[Any]()
    together = {site for site in sites if site.startswith("experts.")}

    def see(site: str, value: Tensor) -> None:
        seen[site] = value
        if stop and len(seen) == len(sites):
            raise AllSeen

    def tap_input(module: nn.Module, site: str) -> None:
        handles.append(module.register_forward_pre_hook(lambda m, a, k: see(site, first(a, k)), with_kwargs=True))

    def tap_output(module: nn.Module, site: str) -> None:
        handles.append(
            module.register_forward_hook(lambda m, a, out: see(site, out[0] if isinstance(out, tuple) else out))
        )

    def tap_back(linear: nn.Module, site: str) -> None:
        """An alias of the input that nobody else reads: what goes back to it comes through this linear alone."""

        def look(module, args):
            alias = args[0].view_as(args[0])
            see(site, alias)
            return (alias, *args[1:])

        handles.append(linear.register_forward_pre_hook(look))

    def tap_product(linear: nn.Module, site: str) -> None:
        handles.append(
            linear.register_forward_hook(lambda m, a, out: see(site, out if m.bias is None else out - m.bias))
        )

    if family.experts is not None and any(site.startswith("expert") for site in sites):
        handles += seen.watch(block, family.experts, together, see)
    for site in sites - together:
        where, _, end = site.rpartition(".")
        if end == "back":
            tap_back(get_linear(block, family, where), site)
        elif end == "product":
            tap_product(get_linear(block, family, where), site)
        elif where == "block":
            (tap_input if end == "in" else tap_output)(block, site)
        elif end == "raw":
            tap_input(find_end(block, family, where, end), site)
        elif end == "add":
            handles.append(
                tap_added(find_end(block, family, where, end), read_factor(block, family), partial(see, site))
            )
        else:
            (tap_input if end in ("in", "gated") else tap_output)(get_linear(block, family, where), site)
    handles += copy_added(block, family)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
