"""Rounding to nearest, without and with a choice of the basis before: perplexity; writes docs/tables/gauges.md.

    python benchmarks/gauges.py                                          # the embedded model
    python benchmarks/gauges.py --model FOLDER --text FILE --name NAME   # any other; FILE is split: 3/4 to calibrate
    python benchmarks/gauges.py --evaluate FILE --folders DIR ...        # another text; compressed folders are kept and used again

Every linear of the blocks is rounded, asymmetric, in groups of 64 inputs. "basis":
`planish.rounding.gauges_model.balance_model` before.
"again": the second factor of pairs and pivoted linears is solved again for the first one as it was rounded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer

import planish
from planish.calibrate.text import load_tokens, sample_windows
from planish.modelling.modules import Pair, Pivoted
from planish.rounding.gauges_factors import round_factors
from planish.rounding.gauges_linears import read_linear, write_linear
from planish.rounding.gauges_maps import round_to_nearest
from planish.rounding.gauges_model import balance_model

sys.path.insert(0, str(Path(__file__).parent))
from structural import ROOT, split_text, write_section

TABLE = ROOT / "docs" / "tables" / "gauges.md"
START = (
    "# The basis that weights are rounded in\n\nWritten by `benchmarks/gauges.py`; rounding to nearest, groups of 64.\n"
)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "src" / "planish" / "data" / "demo")
    parser.add_argument("--name", default="embedded model")
    parser.add_argument("--text", type=Path, help="text to calibrate and to evaluate on (default: builtin)")
    parser.add_argument("--evaluate", type=Path, help="another text to evaluate on; all of --text is for calibration")
    parser.add_argument("--methods", default="dense,flat-llm,a3,modegpt,svd-llm,auto")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--folders", type=Path, help="where compressed folders are kept, METHOD each")
    parser.add_argument("--n-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=40, help="evaluation windows of --seq-len tokens")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def list_linears(model: nn.Module) -> list[nn.Linear]:
    head = model.get_output_embeddings()
    return [m for m in model.modules() if type(m) is nn.Linear and m is not head]


def measure_factored(model: nn.Module, ids: Tensor) -> dict[nn.Module, Tensor]:
    """Σ x xᵀ of the inputs of pairs and pivoted linears."""
    grams: dict[nn.Module, Tensor] = {}

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2)
        grams[module] = grams.get(module, 0) + x.T @ x

    handles = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, (Pair, Pivoted))]
    for row in ids:
        model(row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return grams


def round_model(model: nn.Module, bits: int, grams: dict[nn.Module, Tensor]) -> None:
    """Every linear of the blocks in place, those of `grams` with their second factor solved again."""
    rounding: Callable[[Tensor], Tensor] = lambda w: round_to_nearest(w, bits)  # noqa: E731
    done = set()
    for module, gram in grams.items():
        linear = read_linear(module)
        assert linear is not None
        write_linear(module, round_factors(linear, gram.double(), lambda w, gram: rounding(w)))
        done |= set(module.modules())
    for linear in list_linears(model):
        if linear not in done:
            linear.weight = nn.Parameter(
                rounding(linear.weight.data.float()).to(linear.weight.dtype), requires_grad=False
            )


class Bench:
    def __init__(self, args: argparse.Namespace, scratch: Path):
        self.args = args
        self.folders = args.folders or scratch
        fit, test = split_text(None if args.evaluate else args.text, scratch)
        self.fit, self.test = (str(args.text), args.evaluate) if args.evaluate else (fit, test)
        self.ids: Tensor | None = None

    def open(self, method: str) -> Path:
        """The folder that a method makes of the model, made unless it is there."""
        args, folder = self.args, self.folders / method
        if method == "dense" and args.model.is_dir():
            return args.model
        if not folder.exists():
            more = {"keep": 1.0, "method": "flat-llm"} if method == "dense" else {"keep": args.keep, "method": method}
            planish.compress(
                args.model, calibration=self.fit, n_samples=args.n_samples, seq_len=args.seq_len, output=folder, **more
            )
        return folder

    def perplexity(self, model: nn.Module, tokenizer) -> str:
        found = planish.evaluate(
            model, self.test, self.args.seq_len, tokenizer=tokenizer, max_windows=self.args.windows
        )
        return f"{found.perplexity:.2f}"

    def row(self, method: str) -> str:
        args, folder = self.args, self.open(method)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if self.ids is None:
            text = load_tokens(self.fit, tokenizer)
            self.ids = sample_windows(text.tokens, args.n_samples, args.seq_len, 0)
        model = planish.load(folder, dtype="float32")
        cells = [method, self.perplexity(model, tokenizer)]
        for bits in (int(b) for b in args.bits.split(",")):
            for basis, again in ((False, False), (True, False), (True, True)):
                model = planish.load(folder, dtype="float32")
                if basis:
                    balance_model(model, self.ids)
                grams = measure_factored(model, self.ids) if again else {}
                if again and not grams:
                    cells.append("–")
                    continue
                round_model(model, bits, grams)
                cells.append(self.perplexity(model, tokenizer))
        return "| " + " | ".join(cells) + " |"


@torch.no_grad()
def main() -> None:
    args = read_arguments()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    bits = args.bits.split(",")
    headings = ["method", "16 bits", *(f"{b} bits{more}" for b in bits for more in ("", ", basis", ", basis, again"))]
    rows = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, Path(scratch))
        for method in args.methods.split(","):
            rows.append(bench.row(method))
            print(rows[-1], flush=True)
    facts = (
        f"Perplexity of {args.windows} × {args.seq_len} tokens, methods at keep {args.keep:g}. "
        f"Calibration {args.n_samples} × {args.seq_len} tokens."
    )
    write_section(TABLE, START, args.name, f"{facts}\n\n" + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
