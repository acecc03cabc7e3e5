"""Probes a server before anything is generated; knows vLLM's answers and the requests that bring them out.

Every check ends in a fact or in one error that names the server and what to change.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from midlogit.engines.http import rows
from midlogit.engines.http.client import BrokenAnswer, CallFailed, Client, Endpoint, unavailable
from midlogit.engines.http.fingerprints import PROMPTS, Fingerprint, fingerprint
from midlogit.engines.http.tokenizing import read_ids
from midlogit.engines.http.urls import shown
from midlogit.engines.http.verification import PATH, VerifyRequest, read_verified, verify_body
from midlogit.errors import InvalidRequest, ServerUnavailable

DEFAULT_LOGPROBS = 20  # vLLM's own --max-logprobs
NO_SUCH_ID = (
    2_000_000_000  # no vocabulary has this id, and no server allows as many log-probabilities
)
PROBE_TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it?\n\n  def f(x):\n\treturn x**2  # 3.14\n",
    "Größe, naïveté, œuvre; Привет, мир! 你好,世界。 こんにちは 안녕하세요 שלום مرحبا 🦊👩‍🔬",
    "0123456789 12345 1e-5 https://example.org/a?b=c&d=%20 AAAAaaaa     ...---===",
)
# Special tokens in common use; without tokenizer files, their ids come from the server's /tokenize.
KNOWN_SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>",
    "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|return|>", "<|call|>",
    "<|start|>", "<|message|>", "<|channel|>", "[INST]", "[/INST]", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "[BOS]", "[EOS]", "<｜end▁of▁sentence｜>",
    "<｜begin▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """The result of a handshake with one server.

    Attributes:
        model: the name that it is served by. root: where it was loaded from, a folder or hub id.
        max_context: most tokens of prompt and completion together. form: of its answers.
        max_logprobs: most log-probabilities per position. scores: whether it scores chosen ids.
        verifies: whether it gives the rows along one sequence, with chosen ids.
        tokenizes: whether it offers /tokenize. version: of vLLM, None where it does not say.
        fingerprint: of its weights.
    """

    endpoint: Endpoint
    model: str
    root: str
    max_context: int
    form: rows.Form
    max_logprobs: int
    scores: bool
    verifies: bool
    tokenizes: bool
    version: str | None
    fingerprint: Fingerprint

    @property
    def logit_size(self) -> int:
        """Ids that the model has."""
        return self.form.logit_size


async def shake_hands(
    client: Client, server: Endpoint, model: str | None, top_k: int | None
) -> ServerFacts:
    """Finds out what a server offers.

    Args:
        model: the name that it must serve; None takes its first.
        top_k: log-probabilities per position that it must allow; None for any number.

    Raises:
        ServerUnavailable: no vLLM server is there, it refuses the key, or it lacks what is needed.
        InvalidRequest: it does not offer `model` or `top_k`.
    """
    card = await _model_card(client, server, model)
    name = str(card["id"])
    max_logprobs, logit_size = await asyncio.gather(
        _limit_in_refusal(
            client, server, _probe_body(name, logprobs=NO_SUCH_ID), r"max allowed:? ?(\d+)"
        ),
        _limit_in_refusal(
            client,
            server,
            _probe_body(name, logit_bias={str(NO_SUCH_ID): 1}),
            r"[Vv]ocabulary size: ?(\d+)",
        ),
    )
    if logit_size is None:
        raise ServerUnavailable(
            f"The {server.name} does not say how many ids its model has: is it a vLLM server?",
            "midlogit needs vLLM.",
        )

    max_logprobs = min(max_logprobs or DEFAULT_LOGPROBS, logit_size)
    if top_k is not None and min(top_k, logit_size) > max_logprobs:
        raise InvalidRequest(
            f"top_k is {top_k}, but the {server.name} allows {max_logprobs} log-probabilities.",
            f"Start it with --max-logprobs {top_k}, or lower top_k.",
        )

    k = min(top_k or DEFAULT_LOGPROBS, max_logprobs)
    form, found = await _probe_rows(client, server, name, k, logit_size)
    scores, verifies, tokenizes, version = await asyncio.gather(
        _can_score(client, server, name, form),
        _can_verify(client, server, name, form),
        _can_tokenize(client, server, name),
        _version(client, server),
    )
    return ServerFacts(
        endpoint=server,
        model=name,
        root=str(card.get("root") or name),
        max_context=card["max_model_len"],
        form=form,
        max_logprobs=max_logprobs,
        scores=scores,
        verifies=verifies,
        tokenizes=tokenizes,
        version=version,
        fingerprint=fingerprint(found),
    )


async def drafting_problem(client: Client, facts: ServerFacts) -> str | None:
    """Why a server cannot draft, which takes sampling by temperature and seed; None when it can."""
    try:
        sampled = [await _drafted(client, facts, seed) for seed in (1, 1, 2)]
    except BrokenAnswer as failure:
        return failure.message
    except CallFailed as failure:
        if failure.retryable:
            raise unavailable(facts.endpoint, failure) from failure
        return failure.message

    if sampled[0] != sampled[1]:
        return "it draws other tokens from the same seed"
    if sampled[0] == sampled[2]:
        return "it draws the same tokens whatever temperature and seed"
    return None


async def _drafted(client: Client, facts: ServerFacts, seed: int) -> list[int]:
    """Drafts of one seed, so long and hot that they are not sampled twice by chance."""
    request = rows.DraftRequest(16, rows.HOTTEST, seed)
    k = min(DEFAULT_LOGPROBS, facts.max_logprobs)
    body = rows.draft_body(facts.model, PROMPTS[0], k, request)

    def read(answer: Any) -> list[int]:
        return [step.token_id for step in rows.read_drafts(answer, body, facts.form)]

    return list(await client.call(facts.endpoint, "/completions", body, read))


async def probe_tokens(client: Client, facts: ServerFacts) -> list[list[int]]:
    """The ids that the server itself gives the probe texts."""
    return list(
        await asyncio.gather(*(_tokens(client, facts, {"prompt": text}) for text in PROBE_TEXTS))
    )


async def has_chat_template(client: Client, facts: ServerFacts) -> bool:
    """Whether the server turns messages into ids."""
    try:
        await _tokens(client, facts, {"messages": [{"role": "user", "content": "Hi"}]})
    except CallFailed as failure:
        if failure.status != 400:
            raise unavailable(facts.endpoint, failure) from failure
        return False
    return True


async def templated_ids(client: Client, facts: ServerFacts) -> frozenset[int]:
    """Ids of a short conversation in the chat template: the template's own and those of the words."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]
    return frozenset(
        await _tokens(client, facts, {"messages": messages, "add_generation_prompt": False})
    )


async def special_ids(client: Client, facts: ServerFacts) -> frozenset[int]:
    """Ids of those of KNOWN_SPECIALS that the server's tokenizer has."""
    bodies = ({"prompt": text, "add_special_tokens": False} for text in KNOWN_SPECIALS)
    found = await asyncio.gather(*(_tokens(client, facts, body) for body in bodies))
    return frozenset(ids[0] for ids in found if len(ids) == 1 and ids[0] < facts.logit_size)


async def stop_ids(
    client: Client, facts: ServerFacts, candidates: frozenset[int]
) -> tuple[int, ...]:
    """The candidates that end a sequence on the server: where one is forced, no second token follows."""

    async def ends(token_id: int) -> bool:
        body = _probe_body(
            facts.model, allowed_token_ids=[token_id], max_tokens=2, ignore_eos=False
        )
        return bool(await client.call(facts.endpoint, "/completions", body, _is_stopped))

    ordered = sorted(candidates)
    return tuple(
        i
        for i, stop in zip(ordered, await asyncio.gather(*map(ends, ordered)), strict=True)
        if stop
    )


def _is_stopped(answer: Any) -> bool:
    """Whether the completion ended by itself."""
    (choice,) = answer["choices"]
    reason = choice["finish_reason"]
    if reason not in ("stop", "length"):
        raise BrokenAnswer(f"its completion ended with {reason!r}")
    return bool(reason == "stop")


async def _model_card(client: Client, server: Endpoint, model: str | None) -> dict[str, Any]:
    """The model's entry in /v1/models."""
    try:
        cards = await client.call(server, "/models", read=_read_cards, retry_unreachable=False)
    except BrokenAnswer as failure:
        raise ServerUnavailable(
            f"The {server.name} does not answer like a vLLM server: {failure.message}.",
            "Give the URL of a `vllm serve`, ending in /v1.",
        ) from failure
    except CallFailed as failure:
        raise await _explain(client, server, failure) from failure

    if model is None:
        return dict(next(iter(cards.values())))
    if model not in cards:
        raise InvalidRequest(
            f"The {server.name} does not serve {model!r}.", f"It serves {', '.join(cards)}."
        )
    return dict(cards[model])


def _read_cards(answer: Any) -> dict[str, dict[str, Any]]:
    """The entries of /v1/models by name; all have the context of the first, since adapters do not say theirs."""
    entries = answer["data"]
    context = entries[0]["max_model_len"]
    if type(context) is not int or context < 1:
        raise BrokenAnswer(f"its context is {context!r} tokens long")
    return {str(card["id"]): {**card, "max_model_len": context} for card in entries}


async def _explain(client: Client, server: Endpoint, failure: CallFailed) -> ServerUnavailable:
    """The reason why a server did not list its models."""
    if failure.status in (401, 403):
        variable = f"MIDLOGIT_{server.side.upper()}_API_KEY"
        hint = f"Give --{server.side}-api-key, or set {variable} or OPENAI_API_KEY."
        return unavailable(
            server, CallFailed(f"it refuses the API key (HTTP {failure.status})"), hint
        )

    if failure.status == 404:
        hint = "Give the URL of a `vllm serve`, ending in /v1."
        with suppress(CallFailed):
            root = server.at_root
            await client.call_once(root, "/models")
            hint = f"Did you mean {shown(root.url)}?"
        return unavailable(
            server, CallFailed(f"it answers HTTP 404 to {shown(server.address('/models'))}"), hint
        )

    if failure.status is None:
        return unavailable(server, failure, "Is `vllm serve` running there, and is the URL right?")
    return unavailable(server, failure)


async def _limit_in_refusal(
    client: Client, server: Endpoint, body: dict[str, Any], pattern: str
) -> int | None:
    """The limit that the server names when it refuses a request above it; None when it names none."""
    try:
        await client.call(server, "/completions", body)
    except CallFailed as failure:
        if failure.retryable or failure.status in (401, 403):
            raise unavailable(server, failure) from failure
        found = re.search(pattern, failure.message)
        return int(found.group(1)) if found else None
    return None


async def _probe_rows(
    client: Client, server: Endpoint, model: str, k: int, logit_size: int
) -> tuple[rows.Form, list[dict[int, float]]]:
    """The form of a server's answers, and its `k` most likely ids after PROMPTS.

    Raises:
        ServerUnavailable: the server gives no log-probabilities by token id.
    """
    body = rows.top_body(model, PROMPTS, k)

    def read(answer: Any) -> tuple[rows.Form, list[dict[int, float]]]:
        form = rows.Form(logit_size, rows.echoes(answer, body))
        return form, rows.read_top(answer, body, form)

    try:
        found: tuple[rows.Form, list[dict[int, float]]] = await client.call(
            server, "/completions", body, read
        )
    except CallFailed as failure:
        hint = (
            "midlogit needs a vLLM server that honours return_tokens_as_token_ids and logprobs, "
            "started without --logprobs-mode."
        )
        raise unavailable(server, failure, hint) from failure
    return found


async def _can_score(client: Client, server: Endpoint, model: str, form: rows.Form) -> bool:
    """Whether the server scores chosen ids: old ones ignore or refuse logprob_token_ids."""
    chosen = sorted({1, form.logit_size // 2, form.logit_size - 1})
    body = rows.score_body(model, PROMPTS[:1], chosen)
    try:
        (row,) = await client.call(
            server, "/completions", body, lambda answer: rows.read_rows(answer, body, form)
        )
    except CallFailed as failure:
        if failure.retryable:
            raise unavailable(server, failure) from failure
        return False
    return all(i in row for i in chosen)


async def _can_verify(client: Client, server: Endpoint, model: str, form: rows.Form) -> bool:
    """Whether the server gives the rows along a sequence: most lack the route, or chosen ids in it."""
    first, *drafted = PROMPTS[0]
    request = VerifyRequest(drafted, [[1, form.logit_size - 1]] * (len(drafted) + 1))
    body = verify_body(model, [first], 1, request)
    try:
        found = await client.call(
            server, PATH, body, lambda answer: read_verified(answer, body, form)
        )
    except CallFailed as failure:
        if failure.status is None:
            raise unavailable(server, failure) from failure
        return False
    return found is not None


async def _can_tokenize(client: Client, server: Endpoint, model: str) -> bool:
    try:
        await client.call(server, "//tokenize", {"model": model, "prompt": "Hi"}, read_ids)
    except CallFailed as failure:
        if failure.retryable:
            raise unavailable(server, failure) from failure
        return False
    return True


async def _version(client: Client, server: Endpoint) -> str | None:
    try:
        found = await client.call_once(server, "//version", read=lambda answer: answer["version"])
        return str(found)
    except CallFailed:
        return None


async def _tokens(client: Client, facts: ServerFacts, body: dict[str, Any]) -> list[int]:
    body = {"model": facts.model, **body}
    return list(await client.call(facts.endpoint, "//tokenize", body, read_ids))


def _probe_body(model: str, **changes: Any) -> dict[str, Any]:
    return {"model": model, "prompt": PROMPTS[:1], **rows.EXPLICIT, **changes}
