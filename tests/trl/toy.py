"""An exact pair of 8 ids that disagrees strongly, and the gradient of its expected reward by enumeration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

VOCABULARY = {"<eos>": 0, "<end>": 1, "a": 2, "b": 3, "c": 4, "d": 5, "e": 6, "f": 7}
ENDS = {"base": "<eos>", "teacher": "<end>"}
PROMPT = "a b c"
LENGTH = 3
WORTH = (0.7, -0.4, 1.0, 0.0, -1.0, 0.5, 2.0, -0.5)
EARLY_END = 1.5


def make_pair(folder: Path) -> None:
    """Writes both models; each ends with an id that the other gives a thousandth of its own."""
    for seed, side in enumerate(ENDS, 1):
        end = VOCABULARY[ENDS[side]]
        words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="f"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words,
            eos_token=ENDS[side],
            pad_token="<eos>",
            additional_special_tokens=list(ENDS.values()),
        )
        model = _random_model(seed, end, foreign_end=1 - end)
        model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=0)
        model.save_pretrained(folder / side)
        tokenizer.save_pretrained(folder / side)


def load(folder: Path, side: str) -> tuple[PhiForCausalLM, PreTrainedTokenizerFast]:
    return (
        PhiForCausalLM.from_pretrained(folder / side, dtype=torch.float32),
        PreTrainedTokenizerFast.from_pretrained(folder / side),
    )


def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
    """A reward of the whole completion: places weigh differently, and an early end is worth something."""
    return [_worth(ids) for ids in completion_ids]


def exact_gradient(model: PhiForCausalLM, prompt_ids: list[int]) -> torch.Tensor:
    """∇ E_π[reward] over all parameters, from every completion of at most LENGTH tokens."""
    completions = list(_completions(VOCABULARY[ENDS["base"]]))
    texts = torch.zeros((len(completions), len(prompt_ids) + LENGTH), dtype=torch.int64)
    texts[:, : len(prompt_ids)] = torch.tensor(prompt_ids)
    drawn = torch.zeros((len(completions), LENGTH))
    for row, ids in enumerate(completions):
        texts[row, len(prompt_ids) : len(prompt_ids) + len(ids)] = torch.tensor(ids)
        drawn[row, : len(ids)] = 1

    logits = model(texts).logits[:, len(prompt_ids) - 1 : -1]
    logprobs = logits.log_softmax(-1).gather(-1, texts[:, len(prompt_ids) :, None])[..., 0]
    probs = (logprobs * drawn).sum(-1).exp()
    assert abs(probs.sum().item() - 1) < 1e-5
    expected = (probs * torch.tensor(reward(completions))).sum()
    return _flat(torch.autograd.grad(expected, list(model.parameters())))


def gradient(loss: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    """−∇ of a loss over all parameters."""
    return -_flat(torch.autograd.grad(loss, list(model.parameters())))


def _flat(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts]).double()


def _completions(end: int, before: tuple[int, ...] = ()) -> Iterator[list[int]]:
    for token_id in VOCABULARY.values():
        ids = (*before, token_id)
        if token_id == end or len(ids) == LENGTH:
            yield list(ids)
        else:
            yield from _completions(end, ids)


def _worth(ids: list[int]) -> float:
    places = sum(WORTH[token_id] * place for place, token_id in enumerate(ids, 1))
    return places + (EARLY_END if len(ids) < LENGTH else 0.0)


def _random_model(seed: int, end: int, foreign_end: int) -> PhiForCausalLM:
    """A model with random weights that ends often, and hardly ever with the other's id."""
    torch.manual_seed(seed)
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            eos_token_id=end,
            pad_token_id=0,
            bos_token_id=None,
            initializer_range=0.8,
            resid_pdrop=0.0,
        )
    )
    with torch.no_grad():
        model.lm_head.weight *= 0.5
        model.lm_head.bias[end] += 2.5
        model.lm_head.bias[foreign_end] -= 7.0
    return model
