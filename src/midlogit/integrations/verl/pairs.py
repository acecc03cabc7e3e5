"""Pairs of verl's own servers and the teacher's, opened once in a process; knows where verl keeps the addresses.

verl starts its servers, gives them new weights and takes them out of rotation; nothing of that is done here.
"""

from __future__ import annotations

import asyncio
from typing import Any

from midlogit.engines.http.handshake import PROBE_TEXTS
from midlogit.integrations.checks import require
from midlogit.integrations.verl.options import Options
from midlogit.pair import Pair

_opened: dict[tuple[tuple[str, ...], Options], asyncio.Task[Pair]] = {}


async def policy_urls(client: Any) -> tuple[str, ...]:
    """The OpenAI URLs of the servers that are in rotation; each has an address HOST:PORT as its id.

    Args:
        client: verl's LLMServerClient.
    """
    addresses = await client._load_balancer.get_all_servers.remote()
    return tuple(f"http://{address}/v1" for address in sorted(addresses))


async def pair_of(client: Any, options: Options, tokenizer: Any) -> Pair:
    """The pair of the servers that are in rotation now.

    Args:
        client: verl's LLMServerClient. tokenizer: the policy's, with which verl makes its prompts.

    Raises:
        ServerUnavailable, PairMismatch, InvalidRequest: the servers or the tokenizer cannot be used.
    """
    key = await policy_urls(client), options
    opened = _opened.get(key)
    if opened is None or (opened.done() and opened.exception() is not None):
        opened = asyncio.create_task(asyncio.to_thread(open_pair, *key, tokenizer))
        _opened[key] = opened
    return await opened


def open_pair(urls: tuple[str, ...], options: Options, tokenizer: Any) -> Pair:
    """Opens a pair whose lists widen up to the run's bound, and checks the policy's tokenizer against it.

    Lists of a variable length leave no room for drafts, whose log-probabilities verl's servers would temper.
    """
    pair = Pair.http(urls, options.teacher, top_k="auto", tolerance=options.max_tv_bound)
    try:
        require_policy_tokenizer(tokenizer, pair)
    except BaseException:
        pair.close()
        raise
    return pair


def require_policy_tokenizer(tokenizer: Any, pair: Pair) -> None:
    """The tokenizer of verl's prompts is that of the model which reads them.

    Raises:
        InvalidRequest: it gives other ids.
    """
    base = pair.mixing.base
    for text in PROBE_TEXTS:
        require(
            tokenizer.encode(text, add_special_tokens=False)
            == base.encode(text, add_special_tokens=False),
            f"verl's tokenizer {tokenizer.name_or_path} is not that of its servers, which serve {base.name}.",
            "Leave actor_rollout_ref.model.tokenizer_path out, or serve the model that it belongs to.",
        )
