"""Trains the bundled pair from scratch: one tokenizer, a plain-text base, a larger chat-tuned teacher.

    python training/train_pair.py --out src/midlogit/bundled

Knows the recipe (sizes, schedule, chat form); what the corpus holds is in corpus.py, and the pair's
figures are measured by evaluate_pair.py. Writes OUT/base, OUT/teacher and, with every number of the
recipe, OUT/training.json. Takes a few minutes on a GPU. Needs torch, transformers and tokenizers.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from corpus import Example, load
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

END_OF_TEXT, END_OF_TURN, SYSTEM, USER, ASSISTANT = SPECIAL = (
    "<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>",
)  # fmt: skip
CONTEXT = 1024
# The answer begins with a space, so that both models begin it with the same token.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{{ ' ' + message['content'].strip() if message['role'] == 'assistant' else message['content'] }}"
    "{{ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "Answer in simple words.",
    "You are kind to children.",
)


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int


@dataclass(frozen=True)
class Recipe:
    """Sizes and schedules. Every number may be changed on the command line."""

    vocab: int = 4096
    base: Shape = Shape(hidden=192, layers=4, heads=3, kv_heads=3, mlp=512)
    teacher: Shape = Shape(hidden=256, layers=8, heads=4, kv_heads=2, mlp=640)
    base_epochs: float = 4
    teacher_epochs: float = 12
    teacher_dropout: float = 0.15
    chat_epochs: float = 2
    pretrain_lr: float = 3e-3
    chat_lr: float = 5e-4
    weight_decay: float = 0.3
    tokens_per_batch: int = 32768
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids, of which the first `context` are not scored."""

    ids: np.ndarray
    context: int = 0


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """A byte-level BPE: any text can be encoded, and decoding gives the text back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    return [np.array(encoding.ids, np.int32) for encoding in tokenizer.encode_batch(texts)]


def answer_rows(tokenizer: Tokenizer, prompts: list[str], answers: list[str]) -> list[Row]:
    pairs = zip(encode(tokenizer, prompts), encode(tokenizer, answers), strict=True)
    return [
        Row(np.concatenate([prompt, answer])[:CONTEXT], len(prompt)) for prompt, answer in pairs
    ]


def chat_rows(
    tokenizer: Tokenizer, examples: list[Example], rng: random.Random | None = None
) -> list[Row]:
    """The teacher's view, the answer scored; with `rng`, one row in ten has a system message."""
    prompts = [f"{USER}{example.request}{END_OF_TURN}{ASSISTANT}" for example in examples]
    if rng:
        messages = [f"{SYSTEM}{message}{END_OF_TURN}" for message in SYSTEM_MESSAGES]
        prompts = [
            (rng.choice(messages) if rng.random() < 0.1 else "") + prompt for prompt in prompts
        ]
    return answer_rows(
        tokenizer, prompts, [f" {example.answer}{END_OF_TURN}" for example in examples]
    )


def plain_answer_rows(tokenizer: Tokenizer, examples: list[Example], end: str) -> list[Row]:
    """The base's view of the same answers."""
    prompts = [f"Question: {example.request}\nAnswer:" for example in examples]
    return answer_rows(tokenizer, prompts, [f" {example.answer}{end}" for example in examples])


def packed_rows(forms: list[list[np.ndarray]], rng: random.Random) -> list[Row]:
    """One form of every document, in random order, packed into rows that begin with a document."""
    documents = [rng.choice(choices) for choices in forms]
    rng.shuffle(documents)
    packs: list[list[np.ndarray]] = []
    room = 0
    for ids in documents:
        if len(ids) > room:
            packs.append([])
            room = rng.choice([128, 256, 512, CONTEXT])
        packs[-1].append(ids)
        room -= len(ids)
    return [Row(np.concatenate(pack)[:CONTEXT]) for pack in packs]


def batches(rows: list[Row], tokens_per_batch: int, rng: random.Random) -> list[list[Row]]:
    """Rows of like length together, at most `tokens_per_batch` padded tokens each, in random order."""
    found: list[list[Row]] = [[]]
    for row in sorted(rows, key=lambda row: (len(row.ids), rng.random())):
        if (len(found[-1]) + 1) * len(row.ids) > tokens_per_batch:
            found.append([])
        found[-1].append(row)
    rng.shuffle(found)
    return found


def loss_of(model: LlamaForCausalLM, batch: list[Row]) -> tuple[torch.Tensor, int]:
    """Summed cross entropy over the scored tokens of a batch, and their number."""
    ids = np.zeros((len(batch), max(len(row.ids) for row in batch)), np.int64)
    labels = np.full_like(ids, -100)
    for number, row in enumerate(batch):
        ids[number, : len(row.ids)] = row.ids
        labels[number, row.context : len(row.ids)] = row.ids[row.context :]
    count = int((labels[:, 1:] != -100).sum())
    device = model.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(input_ids=torch.from_numpy(ids).to(device), use_cache=False).logits
    targets = torch.from_numpy(labels[:, 1:]).to(device).flatten()
    scores = logits[:, :-1].float().flatten(0, 1)
    return torch.nn.functional.cross_entropy(
        scores, targets, ignore_index=-100, reduction="sum"
    ), count


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, rows: list[Row]) -> float:
    model.eval()
    results = [loss_of(model, batch) for batch in batches(rows, 16384, random.Random(0))]
    return sum(float(loss) for loss, _ in results) / sum(count for _, count in results)


def optimizers_of(
    model: LlamaForCausalLM, lr: float, recipe: Recipe
) -> list[torch.optim.Optimizer]:
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    embed = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" in name]
    gains = [p for p in model.parameters() if p.ndim < 2]
    decay = recipe.weight_decay
    muon = torch.optim.Muon(inner, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(
        [{"params": embed, "weight_decay": decay}, {"params": gains, "weight_decay": 0.0}],
        lr=lr, betas=(0.9, 0.95), fused=model.device.type == "cuda",
    )  # fmt: skip
    return [muon, adam]


def train(
    label: str,
    model: LlamaForCausalLM,
    make_rows: Callable[[random.Random], list[Row]],
    epochs: float,
    lr: float,
    recipe: Recipe,
    checks: dict[str, list[Row]],
) -> None:
    """Muon and AdamW, warm-up then cosine to a tenth; `make_rows(rng)` gives each epoch's rows anew."""
    rng = random.Random(recipe.seed)
    plan: list[list[Row]] = []
    for number in range(math.ceil(epochs)):
        epoch = batches(make_rows(rng), recipe.tokens_per_batch, rng)
        plan += epoch[: math.ceil(len(epoch) * min(1.0, epochs - number))]
    optimizers = optimizers_of(model, lr, recipe)
    warm_up = min(200, len(plan) // 10 + 1)
    start = time.monotonic()
    for step, batch in enumerate(plan):
        progress = max(0.0, (step - warm_up) / max(1, len(plan) - warm_up))
        scale = min(1.0, (step + 1) / warm_up) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        model.train()
        loss, count = loss_of(model, batch)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % math.ceil(len(plan) / 5) == 0 or step + 1 == len(plan):
            losses = {name: round(mean_loss(model, rows), 4) for name, rows in checks.items()}
            print(
                f"{label} {step + 1}/{len(plan)} {time.monotonic() - start:.0f}s",
                losses,
                flush=True,
            )


def build(shape: Shape, vocab: int, dropout: float, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights; while training, each block's output is dropped out."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=shape.hidden, intermediate_size=shape.mlp,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads, head_dim=shape.hidden // shape.heads,
            max_position_embeddings=CONTEXT, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip

    def drop(module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, dropout, module.training)

    if dropout:
        model.model.embed_tokens.register_forward_hook(drop)
        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_hook(drop)
            layer.mlp.down_proj.register_forward_hook(drop)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def save(
    model: LlamaForCausalLM, tokenizer: Tokenizer, end: str, template: str | None, out: Path
) -> None:
    """A Hugging Face folder in bfloat16, with its own end id and, for the teacher, a chat template."""
    end_id = tokenizer.token_to_id(end)
    model.config.eos_token_id = end_id
    model.generation_config = GenerationConfig(eos_token_id=end_id, pad_token_id=0, do_sample=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": list(SPECIAL),
        "eos_token": end,
        "pad_token": END_OF_TEXT,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    if template:
        settings["chat_template"] = template
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=NUMBER", help="change the recipe"
    )
    args = parser.parse_args()
    changes = dict(item.split("=") for item in args.set)
    shapes = {n: Shape(*map(int, v.split(","))) for n, v in changes.items() if "," in v}
    numbers = {n: int(v) if v.isdigit() else float(v) for n, v in changes.items() if "," not in v}
    recipe = Recipe(**shapes, **numbers)
    torch.set_float32_matmul_precision("high")

    training, held_out = load(recipe.seed)
    tokenizer = train_tokenizer([example.plain() for example in training], recipe.vocab)
    # Each model ends its documents with its own id alone, and never sees the other's: as a real base and its
    # chat-tuned teacher do, each gives the other's end next to nothing.
    forms = {
        end: [encode(tokenizer, [form + end for form in e.plain_forms()]) for e in training]
        for end in (END_OF_TEXT, END_OF_TURN)
    }
    tokens = round(
        sum(float(np.mean([len(ids) for ids in choices])) for choices in forms[END_OF_TEXT])
    )
    clean = [example for example in training if example.clean]
    print(
        f"{len(training)} examples, {len(clean)} clean, {tokens} plain-text tokens an epoch",
        flush=True,
    )
    checks = {
        kind: [e for e in held_out if e.clean and e.kind == kind] for kind in ("question", "story")
    }
    plain_checks = {
        end: {
            kind: plain_answer_rows(tokenizer, examples, end) for kind, examples in checks.items()
        }
        for end in forms
    }
    chat_checks = {kind: chat_rows(tokenizer, examples) for kind, examples in checks.items()}

    def plain(end: str) -> Callable[[random.Random], list[Row]]:
        return lambda rng: packed_rows(forms[end], rng)

    def chat(rng: random.Random) -> list[Row]:
        return chat_rows(tokenizer, clean, rng)

    base = build(recipe.base, recipe.vocab, 0.0, recipe.seed)
    train(
        "base",
        base,
        plain(END_OF_TEXT),
        recipe.base_epochs,
        recipe.pretrain_lr,
        recipe,
        plain_checks[END_OF_TEXT],
    )
    teacher = build(recipe.teacher, recipe.vocab, recipe.teacher_dropout, recipe.seed + 1)
    own_checks = plain_checks[END_OF_TURN]
    train(
        "teacher",
        teacher,
        plain(END_OF_TURN),
        recipe.teacher_epochs,
        recipe.pretrain_lr,
        recipe,
        own_checks,
    )
    train("chat", teacher, chat, recipe.chat_epochs, recipe.chat_lr, recipe, chat_checks)

    save(base, tokenizer, END_OF_TEXT, None, args.out / "base")
    save(teacher, tokenizer, END_OF_TURN, CHAT_TEMPLATE, args.out / "teacher")
    figures = {
        "recipe": asdict(recipe),
        "examples": {"training": len(training), "clean": len(clean), "held_out": len(held_out)},
        "plain_text_tokens": tokens,
        "parameters": {"base": base.num_parameters(), "teacher": teacher.num_parameters()},
    }
    (args.out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
