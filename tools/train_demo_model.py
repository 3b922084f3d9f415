"""Train the embedded demo model, a small LLaMA, or a mixture of experts, on the Python standard library's own source.

    python tools/train_demo_model.py -o src/planish/data/demo --log docs/demo_model_log.csv
    python tools/train_demo_model.py --experts 16 --fp32 --log docs/demo_mixture_log.csv

Text: `planish.calibrate.documents.builtin_text("train")` and, where the installation has it, Python's test suite; whole
modules are held out by a hash of their names. Byte-level BPE of 4,096 tokens. `--experts 16` trains a mixture (Qwen3-MoE, two
experts per token, balanced by its auxiliary loss) with the embedded model's tokenizer, embeddings and, of as many blocks as it
has, attentions to start from; it is not part of planish and goes to the cache folder, where benchmarks and tests look for it.
Muon for the blocks' matrices, AdamW for the rest; trapezoid learning rate; bf16 autocast on fp32 weights. Seeds are fixed; the
result is reproducible up to the arithmetic of the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from planish.calibrate.cache import find_root
from planish.calibrate.documents import builtin_text

DEMO = Path(__file__).parents[1] / "src" / "planish" / "data" / "demo"


def train_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [text[i : i + 100_000] for i in range(0, len(text), 100_000)],
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


@torch.no_grad()
def orthogonalise(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton–Schulz iteration towards the nearest semi-orthogonal matrix, of each of several stacked ones."""
    x = g.bfloat16() if g.is_cuda else g  # many CPUs only emulate bf16
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return (x.mT if transposed else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(m, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[-2] / p.shape[-1]) ** 0.5)


def build(args: argparse.Namespace) -> torch.nn.Module:
    """A LLaMA, or a mixture of `args.experts` experts; residual branches start at zero."""
    common: dict[str, Any] = {
        "vocab_size": args.vocab, "hidden_size": args.hidden, "num_hidden_layers": args.blocks, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.02,
    }  # fmt: skip
    model: torch.nn.Module
    if args.experts:
        mixture = {
            "num_experts": args.experts,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "output_router_logits": True,
        }
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(moe_intermediate_size=args.intermediate or 128, **common, **mixture))
    else:
        model = LlamaForCausalLM(LlamaConfig(intermediate_size=args.intermediate or 576, **common))
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            torch.nn.init.zeros_(p)
    if args.experts:
        start_from(model, LlamaForCausalLM.from_pretrained(DEMO, dtype=torch.float32))
    return model.to(args.device)


@torch.no_grad()
def start_from(model: Any, trained: Any) -> None:
    """Embeddings, last norm, and attentions of blocks spread over all of them, of a trained model with the same sizes."""
    model.model.embed_tokens.weight.copy_(trained.model.embed_tokens.weight)
    model.model.norm.weight.copy_(trained.model.norm.weight)
    blocks = trained.model.layers
    for i, block in enumerate(model.model.layers):
        found = blocks[i * len(blocks) // len(model.model.layers)]
        for role in ("q", "k", "v", "o"):
            own, other = (b.self_attn.get_submodule(f"{role}_proj").weight for b in (block, found))
            own.copy_(other)
        block.input_layernorm.weight.copy_(found.input_layernorm.weight)


def save(model: Any, folder: Path) -> None:
    """Weights in bf16, the tied matrix once."""
    model.save_pretrained(folder)
    weights = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="folder; of a mixture: mixture in planish's cache folder")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--blocks", type=int, help="12, or 4 of a mixture")
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--intermediate", type=int, help="neurons: 576, or 128 of each expert")
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--steps", type=int, help="2800, or 200 of a mixture")
    parser.add_argument("--batch", type=int, help="10, or 8 for a mixture: sequences of --seq-len per step")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's; AdamW's is a seventh of it")
    parser.add_argument("--cooldown", type=float, default=0.5, help="share of the steps over which the rate falls to 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume", action="store_true", help="go on from -o and the last row of --log (momentum starts afresh)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fp32", action="store_true", help="no autocast: faster where the CPU only emulates bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    for name, dense, mixture in (("blocks", 12, 4), ("steps", 2800, 200), ("batch", 10, 8)):
        if getattr(args, name) is None:
            setattr(args, name, mixture if args.experts else dense)
    args.output = args.output or (find_root() / "mixture" if args.experts else DEMO)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    train_text, heldout_text = builtin_text("train", with_tests=True), builtin_text("heldout")
    if args.experts:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO)
    else:
        tokenizer = train_tokenizer(train_text, args.vocab)
    if not args.resume:
        tokenizer.save_pretrained(args.output)
    ids, heldout = (
        torch.tensor(tokenizer._tokenizer.encode(t).ids, dtype=torch.int32) for t in (train_text, heldout_text)
    )
    print(f"train {len(train_text):,} chars {len(ids):,} tokens; held out {len(heldout):,} tokens", flush=True)

    model = build(args)
    rows, first = ["step,tokens,seconds,lr,train_nll,heldout_nll"], 0
    if args.resume:
        model.load_state_dict(type(model).from_pretrained(args.output, dtype=torch.float32).state_dict())
        rows = args.log.read_text().split()
        first = int(rows[-1].split(",")[0])
    inner = {n for n, p in model.named_parameters() if p.ndim > 1 and ".layers." in n and ".mlp.gate.weight" not in n}
    matrices = [p for n, p in model.named_parameters() if n in inner]
    others = [p for n, p in model.named_parameters() if n not in inner]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    muon = Muon(matrices, lr=args.lr)
    adam = torch.optim.AdamW(others, lr=args.lr / 7, betas=(0.9, 0.95), weight_decay=0.0)
    optimizers = [(muon, args.lr), (adam, args.lr / 7)]

    @torch.no_grad()
    def heldout_nll(limit: int) -> float:
        model.eval()
        windows = heldout[: len(heldout) // args.seq_len * args.seq_len].view(-1, args.seq_len)[:limit]
        total = 0.0
        for w in windows.split(16):
            w = w.long().to(args.device)
            logits = model(input_ids=w).logits[:, :-1].float().flatten(0, 1)
            total += torch.nn.functional.cross_entropy(logits, w[:, 1:].flatten()).item() * len(w)
        model.train()
        return total / len(windows)

    every = min(250, max(25, args.steps // 6))
    generator = torch.Generator().manual_seed(args.seed + first)
    start, running = time.time(), 0.0
    model.train()
    for step in range(first, args.steps):
        scale = min(1.0, (step + 1) / min(100, args.steps / 10), (args.steps - step) / (args.steps * args.cooldown))
        for optimizer, lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
        halves = 2 if step < 0.6 * args.steps else 1  # shorter windows first: attention is the dearest part on a CPU
        seq_len = args.seq_len // halves
        at = torch.randint(len(ids) - seq_len - 1, (args.batch * halves,), generator=generator)
        batch = torch.stack([ids[i : i + seq_len] for i in at]).long().to(args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=not args.fp32):
            out = model(input_ids=batch)
        logits, balance = out.logits, getattr(out, "aux_loss", None)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
        (loss if balance is None else loss + 0.01 * balance).backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running = loss.item() if step == first else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % every == 0 or step + 1 == args.steps:
            final = step + 1 == args.steps
            nll = heldout_nll(len(heldout) if final and not args.experts else 100)
            rows.append(
                f"{step + 1},{(step + 1) * batch.numel()},{time.time() - start:.0f},{scale * args.lr:.5f},{running:.4f},{nll:.4f}"
            )
            print(rows[-1], flush=True)
            if args.log:
                args.log.write_text("\n".join(rows) + "\n")
            save(model, args.output)
        elif step in (5, 20, 60):
            print(f"step {step} {(step + 1) * batch.numel() / (time.time() - start):.0f} tokens/s", flush=True)
    print(f"held-out perplexity {math.exp(nll):.3f} (fp32 weights, windows of {args.seq_len})")


if __name__ == "__main__":
    main()
