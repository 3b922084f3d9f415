"""Integer weights after compression (torchao, weight-only): perplexity and bytes; writes docs/tables/quantised.md.

    python benchmarks/quantise.py                                          # the embedded model
    python benchmarks/quantise.py --model FOLDER --text FILE --name NAME   # any other; FILE is split: 3/4 to calibrate

int8: one scale per output channel. int4: one scale per group of 32, 16 or 8 inputs, the largest that divides the width;
ranks are rounded to multiples of --round-to so that groups fit. Embeddings and head stay as they are.
Bytes count integers, scales and adapters of the blocks' linears.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer

import planish
from planish.export.eora import quantise_model

sys.path.insert(0, str(Path(__file__).parent))
from structural import ROOT, split_text, write_section

TABLE = ROOT / "docs" / "tables" / "quantised.md"
START = "# Integer weights after compression\n\nWritten by `benchmarks/quantise.py`; weight-only, torchao.\n"


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "src" / "planish" / "data" / "demo")
    parser.add_argument("--name", default="embedded model")
    parser.add_argument("--text", type=Path, help="text to calibrate and to evaluate on (default: builtin)")
    parser.add_argument("--method", default="a3")
    parser.add_argument("--loader", action="store_true", help="int8 while transformers loads, instead of afterwards")
    parser.add_argument("--keep", default="0.9,0.8", help="empty: only the dense model")
    parser.add_argument("--ranks", default="8,32,64", help="of EoRA adapters on int4 (needs peft); empty: none")
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--n-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def measure(model: nn.Module, text: Path, args: argparse.Namespace) -> float:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    found = planish.evaluate(model, text, args.seq_len, tokenizer=tokenizer, max_windows=args.windows, batch_size=4)
    return found.perplexity


def count(model: nn.Module) -> int:
    """Bytes of the blocks' linear weights."""
    head = model.get_output_embeddings()
    return sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear) and m is not head)


def compensate(folder: Path, rank: int, calibration: Path, held_out: Path, args: argparse.Namespace) -> str:
    """int4 with an EoRA adapter that PEFT loads."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as adapter:
        found = planish.eora(
            folder, adapter, bits=4, rank=rank, quantiser="torchao", calibration=calibration,
            n_samples=args.n_samples, seq_len=args.seq_len,
        )  # fmt: skip
        model = planish.load(folder, dtype="bfloat16")
        size = quantise_model(model, 4) + found.adapter_bytes
        tuned = PeftModel.from_pretrained(model, adapter).eval()
        return f"{measure(tuned, held_out, args):.3f} ({size / 1e6:.2f} MB)"


def load_int8(folder: Path) -> tuple[nn.Module, int]:
    """The same int8 weights, made by transformers' own loader: `quantization_config` at from_pretrained."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", quantization_config=config).eval()
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    assert all(type(m.weight.data) is not torch.Tensor for m in linears)
    return model, sum(m.out_features * (m.in_features + 2) for m in linears)


def main() -> None:
    args = read_arguments()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        calibration, held_out = split_text(args.text, Path(scratch))
        ranks = [int(r) for r in args.ranks.split(",") if r]
        models = {"dense": args.model}
        for keep in filter(None, args.keep.split(",")):
            models[f"{args.method} {keep}"] = Path(scratch) / keep
            planish.compress(
                args.model, keep=float(keep), method=args.method, calibration=calibration, n_samples=args.n_samples,
                seq_len=args.seq_len, output=Path(scratch) / keep, round_to=args.round_to,
            )  # fmt: skip
        headings = ["model", "bf16", "int8", "int4", *(f"int4 + eora, rank {r}" for r in ranks)]
        rows = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
        for name, folder in models.items():
            cells = []
            for bits in (16, 8, 4):
                if bits == 8 and args.loader:
                    model, size = load_int8(folder)
                else:
                    model = planish.load(folder, dtype="bfloat16")
                    size = count(model) if bits == 16 else quantise_model(model, bits)
                cells.append(f"{measure(model, held_out, args):.3f} ({size / 1e6:.2f} MB)")
            cells += [compensate(folder, rank, calibration, held_out, args) for rank in ranks]
            rows.append(f"| {name} | " + " | ".join(cells) + " |")
            print(rows[-1], flush=True)
    facts = (
        f"Perplexity of {args.windows} × {args.seq_len} tokens (bytes of the blocks' linear weights, scales and adapters). "
        f"Calibration {args.n_samples} × {args.seq_len} tokens.{' int8 made while loading.' if args.loader else ''}"
    )
    write_section(TABLE, START, args.name, f"{facts}\n\n" + "\n".join(rows))


if __name__ == "__main__":
    main()
