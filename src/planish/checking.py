"""What is refused before any work: too few tokens, a place that is taken, windows that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from planish import lanes
from planish.calibrate.text import unmark
from planish.errors import InputError
from planish.folder.owner import check_output
from planish.folder.source import FolderSource, Source
from planish.methods.method import Method
from planish.plan.problem import Problem


def count_needed(problem: Problem) -> int:
    """Dimension of the largest Gram that is measured."""
    taps = [t for t in problem.taps(problem.block_units(0)) if t.kind in ("gram", "moments")]
    return max((problem.shapes[0].width(t.site) for t in taps), default=0)


def check_tokens(method: Method, problem: Problem, windows: Tensor, settings: dict[str, Any]) -> None:
    """Fewer calibration tokens than a Gram's dimension make it singular: an error unless damping is asked for."""
    own = method.dampings
    if set(own) & set(settings):
        return
    need = count_needed(problem)
    if 0 < windows.numel() < need:
        hint = f", or ask for damping (--set {own[0]}=0.01)" if own else ""
        raise InputError(
            f"calibration has {windows.numel()} tokens, fewer than the largest Gram's dimension {need}: "
            f"use at least {need} tokens (--n-samples × --seq-len){hint}"
        )


def check_place(output: Path, overwrite: bool, source: Source) -> None:
    """What the output is to be may be written: nothing stands there that has to stay."""
    check_apart(output, source)
    if lanes.is_first():
        check_output(output, overwrite)


def check_apart(output: Path, source: Source) -> None:
    """The output must not replace the model that it is made from."""
    if isinstance(source, FolderSource):
        model, place = source.folder.resolve(), output.resolve()
        if place == model or place in model.parents:
            raise InputError(f"output {output} would replace the model {source.folder}; choose another folder")


def check_windows(windows: Tensor, source: Source) -> None:
    limit = getattr(source.config, "max_position_embeddings", None)
    rope = getattr(source.config, "rope_parameters", None) or {}
    if limit and rope.get("rope_type") == "dynamic":  # tables that grow with the sequence
        limit = int(limit * rope.get("factor", 1.0))
    if limit and windows.shape[-1] > limit:
        raise InputError(f"--seq-len {windows.shape[-1]} is longer than the model's {limit} positions")
    vocabulary, largest = source.config.vocab_size, int(unmark(windows).max()) if windows.numel() else -1
    if largest >= vocabulary:
        raise InputError(f"calibration holds token id {largest}, the model's vocabulary has {vocabulary}")
