"""Measures the bundled pair on held-out requests: perplexity, divergence, and how samples of q* end.

    python training/evaluate_pair.py src/midlogit/bundled --write

Knows the two text forms and a plain sampling loop for q*, with no help from midlogit itself, so that it can
serve as a check of it. With --write the figures go into PAIR/training.json under "held_out".
"""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path

import torch
from corpus import Example, load
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerBase

KINDS = {
    "question": 64,
    "story": 200,
}  # and the number of tokens that nearly every answer keeps within
MAX_TOKENS = 300
TOP_P = 0.95  # the support: the teacher's nucleus


class Pair:
    def __init__(self, folder: Path) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.models = [
            AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
            .to(self.device)
            .eval()
            for name in ("base", "teacher")
        ]
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder / "teacher")
        self.ends = [model.generation_config.eos_token_id for model in self.models]
        self.masked = [i for i in self.tokenizer.all_special_ids if i not in self.ends]

    def prompts(self, request: str) -> tuple[list[int], list[int]]:
        """The request as the base and as the teacher see it."""
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": request}], add_generation_prompt=True, tokenize=False
        )
        return self.ids(f"Question: {request}\nAnswer:"), self.ids(chat)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def log_probs(self, logits: torch.Tensor, merged: bool) -> torch.Tensor:
        """Without the special tokens, renormalised; merged, the teacher's end holds the mass of both ends."""
        logits = logits.float().index_fill(
            -1, torch.tensor(self.masked, device=self.device), -torch.inf
        )
        found = logits.log_softmax(-1)
        if merged:
            base_end, teacher_end = self.ends
            found[..., teacher_end] = torch.logaddexp(found[..., teacher_end], found[..., base_end])
            found[..., base_end] = -torch.inf
        return found


@torch.no_grad()
def score(pair: Pair, examples: list[Example]) -> torch.Tensor:
    """Sums over the answers' tokens, ends included: tokens, base loss, teacher loss, KL(teacher‖base)."""
    sums = torch.zeros(4, dtype=torch.float64)
    for example in examples:
        answer = pair.ids(" " + example.answer)
        rows = []
        for side, prompt in enumerate(pair.prompts(example.request)):
            ids = torch.tensor([prompt + answer], device=pair.device)
            rows.append(pair.models[side](input_ids=ids).logits[0, len(prompt) - 1 :])
            targets = torch.tensor([*answer, pair.ends[side]], device=pair.device)
            sums[1 + side] += float(
                torch.nn.functional.cross_entropy(rows[side], targets, reduction="sum")
            )
        p, t = (pair.log_probs(row, merged=True) for row in rows)
        sums[0] += len(answer) + 1
        sums[3] += float((t.exp() * (t - p)).nan_to_num(0.0).sum())
    return sums


def figures(sums: torch.Tensor) -> dict[str, float]:
    tokens, base, teacher, divergence = sums.tolist()
    base, teacher = (torch.tensor([base, teacher]) / tokens).exp().tolist()
    return {
        "tokens": int(tokens),
        "base_perplexity": round(base, 3),
        "teacher_perplexity": round(teacher, 3),
        "teacher_below_base": round(1 - teacher / base, 3),
        "kl_teacher_base": round(divergence / tokens, 4),
    }


def middle(
    p: torch.Tensor, t: torch.Tensor, top_p: float, first: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q*, alpha and KL(q*‖base) on the teacher's nucleus, by bisection; at the first token alpha is 1."""
    ordered, order = t.exp().sort(dim=-1, descending=True)
    outside = torch.zeros_like(t, dtype=torch.bool).scatter(
        -1, order, ordered.cumsum(-1) - ordered >= top_p
    )
    outside |= t == -torch.inf
    p, t = (
        x.masked_fill(outside, -torch.inf).log_softmax(-1).masked_fill(outside, 0.0) for x in (p, t)
    )

    def mix(alpha: torch.Tensor) -> torch.Tensor:
        return ((1 - alpha) * p + alpha * t).masked_fill(outside, -torch.inf).softmax(-1)

    low, high = torch.zeros_like(t[:, :1]), torch.ones_like(t[:, :1])
    for _ in range(40):
        alpha = (low + high) / 2
        above = (mix(alpha) * (t - p)).sum(-1, keepdim=True) > 0
        low, high = torch.where(above, low, alpha), torch.where(above, alpha, high)
    alpha = torch.ones_like(low) if first else (low + high) / 2
    q = mix(alpha)
    return q, alpha[:, 0], (q * (q.clamp_min(1e-38).log() - p)).sum(-1)


def cache_keyword(model: torch.nn.Module) -> str:
    """The name of the cache among the parameters of the model's forward: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.no_grad()
def sample(
    pair: Pair, requests: list[str], soon: int, merged: bool, top_p: float
) -> tuple[list[str], dict[str, float]]:
    """Texts from q*; the share that ended by themselves, mean length, and mean alpha and KL after token 1."""
    generator = torch.Generator(pair.device).manual_seed(0)
    inputs, masks = [], []
    caches = [DynamicCache(config=model.config) for model in pair.models]
    for prompts in zip(*map(pair.prompts, requests), strict=True):
        width = max(map(len, prompts))
        inputs.append(
            torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=pair.device)
        )
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        masks.append(torch.tensor(mask, device=pair.device))
    running = torch.ones(len(requests), dtype=torch.bool, device=pair.device)
    lengths = torch.zeros(len(requests), device=pair.device)
    drawn, alphas, divergences = [], [], []
    for step in range(MAX_TOKENS):
        rows = []
        for side, model in enumerate(pair.models):
            positions = (masks[side].cumsum(-1) - 1).clamp_min(0)[:, -inputs[side].shape[1] :]
            out = model(
                input_ids=inputs[side], attention_mask=masks[side], position_ids=positions,
                use_cache=True, **{cache_keyword(model): caches[side]},
            )  # fmt: skip
            rows.append(pair.log_probs(out.logits[:, -1], merged))
        q, alpha, divergence = middle(*rows, top_p, first=step == 0)
        token = torch.multinomial(q, 1, generator=generator)
        drawn.append(token.masked_fill(~running[:, None], pair.ends[1]))
        if step:
            alphas.append(alpha[running])
            divergences.append(divergence[running])
        lengths += running
        running &= (token != pair.ends[0])[:, 0] & (token != pair.ends[1])[:, 0]
        if not running.any():
            break
        inputs = [token, token]
        masks = [torch.cat([mask, torch.ones_like(token)], 1) for mask in masks]
    texts = [
        pair.tokenizer.decode(ids, skip_special_tokens=True) for ids in torch.cat(drawn, 1).tolist()
    ]
    return texts, {
        f"ended_within_{soon}": round(float((~running & (lengths <= soon)).float().mean()), 3),
        f"ended_within_{MAX_TOKENS}": round(float((~running).float().mean()), 3),
        "mean_tokens": round(float(lengths.mean()), 1),
        "alpha": round(float(torch.cat(alphas).mean()), 3),
        "kl_to_each": round(float(torch.cat(divergences).mean()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pair", type=Path)
    parser.add_argument("--prompts", type=int, default=100, help="sampled requests of each kind")
    parser.add_argument("--show", type=int, default=5, help="samples of each kind to print")
    parser.add_argument(
        "--write", action="store_true", help="store the figures in PAIR/training.json"
    )
    args = parser.parse_args()
    pair = Pair(args.pair)
    held_out = load()[1]
    found: dict[str, dict] = {}
    sums = {
        kind: score(pair, [e for e in held_out if e.kind == kind and e.clean]) for kind in KINDS
    }
    for kind, soon in KINDS.items():
        found[kind] = figures(sums[kind])
        candidates = sorted((e for e in held_out if e.kind == kind), key=lambda e: not e.clean)
        requests = list(dict.fromkeys(e.request for e in candidates))[: args.prompts]
        texts, sampled = sample(pair, requests, soon, merged=True, top_p=TOP_P)
        found[kind]["requests"] = len(requests)
        found[kind]["sampled"] = sampled
        for name, merged, top_p in (
            ("full_support", True, 1.0),
            ("unmerged", False, TOP_P),
            ("unmerged_full_support", False, 1.0),
        ):
            found[kind][f"sampled_{name}"] = sample(pair, requests, soon, merged, top_p)[1]
        for request, text in list(zip(requests, texts, strict=True))[: args.show]:
            print(f"{request}\n   {text!r}")
    found["together"] = figures(sums["question"] + sums["story"])
    print(json.dumps(found, indent=2))
    if args.write:
        path = args.pair / "training.json"
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"held_out": found}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
