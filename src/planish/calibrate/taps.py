"""Tensors seen at the sites of taps while a block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from planish.modelling.blocks import get_linear
from planish.modelling.families import Family


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


class AllSeen(Exception):
    """Ends a forward pass whose sites have all been seen."""


@contextmanager
def tap_sites(block: nn.Module, family: Family, sites: set[str], stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Within the context a forward of the block fills the yielded dict with the tensors at these sites.

    `stop`: the forward ends with `AllSeen` as soon as it has them all.
    """
    seen: dict[str, Tensor] = {}
    handles = []

    def first(args, kwargs) -> Tensor:
        return args[0] if args else kwargs["hidden_states"]

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

    for site in sites:
        where, end = site.split(".")
        if end == "back":
            tap_back(get_linear(block, family, where), site)
        elif end == "product":
            tap_product(get_linear(block, family, where), site)
        elif where == "block":
            (tap_input if end == "in" else tap_output)(block, site)
        elif end == "raw":
            norm = family.attention_norm if where == "attention" else family.mlp_norm
            tap_input(block.get_submodule(norm), site)
        elif end == "add":
            post = family.attention_post_norm if where == "attention" else family.mlp_post_norm
            path = post or (family.attention if where == "attention" else family.mlp) or family.path("down")
            tap_output(block.get_submodule(path), site)
        else:
            (tap_input if end == "in" else tap_output)(get_linear(block, family, where), site)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
