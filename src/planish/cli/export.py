"""planish export, planish verify"""

from __future__ import annotations

from enum import StrEnum
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.markup import escape

from planish.cli import options as o
from planish.cli.run import format_bytes, make_table, session
from planish.errors import InputError
from planish.rounding.types import GGML


class To(StrEnum):
    gguf = "gguf"
    onnx = "onnx"
    dense = "dense"
    mimo = "mimo"
    deci = "deci"


class Where(StrEnum):
    hf = "hf"
    vllm = "vllm"
    gguf = "gguf"
    onnx = "onnx"


FileType: Any = cast(Any, StrEnum)("FileType", {n: n for n in ("f32", "f16", "bf16", *GGML)})


FolderArgument = Annotated[
    str,
    typer.Argument(metavar="DIR", help="compressed or Hugging Face folder, GGUF file or hub id", show_default=False),
]


def export(
    folder: FolderArgument,
    to: Annotated[
        To, typer.Option("--to", help="gguf, onnx: one file; dense, mimo, deci: a folder", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="to write", show_default=False)],
    dtype: Annotated[
        FileType | None,
        typer.Option(
            help="gguf (default f16; rounded types to nearest), onnx (default f32), folders (default as stored, products f32)",
            show_default=False,
        ),
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="gguf: this one of llama.cpp's, not the smallest that fits", show_default=False)
    ] = None,
    no_vocabulary: Annotated[bool, typer.Option("--no-vocabulary", help="gguf: leave the tokenizer out")] = False,
    pad: Annotated[bool, typer.Option("--pad", help="dense: fill up with zeros to the stock architecture")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the file, or a folder's model if planish wrote it")
    ] = False,
    as_json: o.JsonOption = False,
) -> None:
    """Write a folder for another stack, exactly or not at all; says what it costs in size."""
    with session(as_json) as run:
        _ = run.api
        from planish.export import export as write

        one_file = to in (To.gguf, To.onnx)
        if one_file and output.exists() and not overwrite:
            raise InputError(f"output {output} exists; choose another or pass --overwrite")
        written = write(
            folder,
            to.value,
            output,
            dtype=dtype and dtype.value,
            architecture=architecture,
            vocabulary=False if no_vocabulary else None,
            pad=pad or None,
            overwrite=overwrite if overwrite and not one_file else None,
        )
        run.give(
            written.as_dict(),
            f"[bold]{escape(str(written.output))}[/] · {written.architecture} · {written.dtype} · {format_bytes(written.bytes)}",
            f"{written.parameters:,} parameters ({written.stored_parameters:,} in the folder) · "
            f"tokenizer {written.tokenizer}",
            *(f"· {note}" for note in written.notes),
        )


def verify(
    folder: FolderArgument,
    target: Annotated[Where, typer.Option("--target", help="where to run it", show_default=False)],
    file: Annotated[
        Path | None,
        typer.Option(help="an exported .gguf or .onnx", show_default="export one now, fp32"),
    ] = None,
    dense_reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="compare with this uncompressed model instead; differences are then only reported",
            show_default=False,
        ),
    ] = None,
    prompt_len: Annotated[int, typer.Option(min=1, help="random tokens to compare logits on")] = 48,
    new_tokens: Annotated[int, typer.Option(min=1, help="greedy tokens to compare")] = 16,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="largest difference, relative to the largest logit",
            show_default="by type: 1e-4 in f32, 5e-3 in f16 and vLLM, 2e-2 in bf16; 5e-2 in q8_0 and 1e-1 in fewer bits, "
            "or tensors that differ by their rounding alone",
        ),
    ] = None,
    as_json: o.JsonOption = False,
) -> None:
    """Reload a folder in another stack and compare logits and greedy tokens with transformers.

    Exit 2 if they differ; with --dense-reference differences are only reported: they are what compression changed.
    """
    with session(as_json) as run:
        _ = run.api
        from planish.export.verify import verify as compare

        found = compare(
            folder,
            target.value,
            file=file,
            dense_reference=dense_reference,
            prompt_len=prompt_len,
            new_tokens=new_tokens,
            tolerance=tolerance,
        )
        reference = dense_reference or "transformers"
        verdict = "the same as" if found.passed else "[bold red]differs from[/]"
        how = f"{reference} (tolerance {found.tolerance:g})"
        if found.passed and not found.close:
            verdict, how = "holds", "the same weights, rounded to its types; logits differ by what that makes of them"
        run.give(found.as_dict(), f"{target.value} {verdict} {how}", tabulate(found))
    if not found.passed and dense_reference is None:
        raise typer.Exit(2)


def tabulate(found: Any) -> Any:
    """What `planish.export.verify.verify` found, for people."""
    table = make_table("", "")
    table.add_row("largest difference of a logit", f"{found.max_logit_difference:.2e}")
    if found.settled_logit_difference is not None:
        words = "the same without tokens between two experts, which counts"
        table.add_row(words, f"{found.settled_logit_difference:.2e}")
    if found.tensor_error is not None:
        words = "tensors differ by their types' rounding" if found.tensor_error <= 1 else "more than rounding explains"
        share = f"{found.tensor_error:.2f} of what it may make of " if isfinite(found.tensor_error) else ""
        table.add_row(words, share + escape(found.tensor))
    table.add_row("mean difference", f"{found.mean_logit_difference:.2e}")
    table.add_row("largest logit", f"{found.max_logit:.2f}")
    table.add_row("greedy tokens that agree", f"{found.greedy_equal} of {found.greedy_tokens}")
    agree = {True: "the same tokens", False: "other tokens", None: "not compared"}
    table.add_row("tokenizer", agree[found.tokenizer_equal])
    return table
