"""From URLs to a pair that can be sampled: the handshake with every server, the tokenizers, what they agree on.

Knows the order of the checks; each check is the handshake's, each text the models' own.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from midlogit.engines.draft_length import DraftLength, SpeculationOption, require_speculation
from midlogit.engines.http.client import CallFailed, Client, Endpoint, endpoint, unavailable
from midlogit.engines.http.engine import HttpEngine, Width
from midlogit.engines.http.handshake import (
    DEFAULT_LOGPROBS,
    PROBE_TEXTS,
    Facts,
    has_chat_template,
    probe_tokens,
    shake_hands,
    special_ids,
    stop_ids,
    templated_ids,
    why_no_drafts,
)
from midlogit.engines.http.pairs import Model as EngineModel
from midlogit.engines.http.served import FilesOfServed, ServedModel
from midlogit.engines.http.side import Side
from midlogit.errors import InvalidRequest, ModelUnavailable, PairMismatch, ServerUnavailable
from midlogit.models.checkpoint import Checkpoint, Model
from midlogit.models.mixing import Mixing

log = logging.getLogger("midlogit")

SIDES = ("base", "teacher")
DRAFT_LOGPROBS = 100  # of drafts: they come at the price of 20, and then few ids are left to score


Spec = tuple[str | Sequence[str], str | None, str | Path | None, str | None]


@dataclass(frozen=True, slots=True)
class Address:
    """Where one side is served.

    Attributes:
        servers: its replicas. model: name served there, None for the first.
        tokenizer: folder or hub id of its tokenizer files, None to find them or to ask the server.
        template: which of the tokenizer's named chat templates to use.
    """

    servers: tuple[Endpoint, ...]
    model: str | None
    tokenizer: str | None
    template: str | None = None

    @classmethod
    def of(cls, side: str, spec: Spec, template: str | None = None) -> Address:
        """From what the user gave: URLs, model, tokenizer, key.

        Raises:
            InvalidRequest: no URL, or something else.
        """
        given, model, tokenizer, key = spec
        key = key or os.environ.get(f"MIDLOGIT_{side.upper()}_API_KEY") or os.environ.get("OPENAI_API_KEY")
        urls = (given,) if isinstance(given, str) else tuple(given)
        if not urls:
            raise InvalidRequest(f"There is no URL for the {side}.", "Give one or several.")
        servers = tuple(endpoint(side, url, key) for url in urls)
        return cls(servers, model, None if tokenizer is None else str(tokenizer), template)


@dataclass(frozen=True, slots=True)
class Served:
    """One side after the handshake: its replicas' facts and its model."""

    facts: tuple[Facts, ...]
    model: Model

    @property
    def max_logprobs(self) -> int:
        return min(facts.max_logprobs for facts in self.facts)

    @property
    def scores(self) -> bool:
        return all(facts.scores for facts in self.facts)


def open_pair(
    *,
    base: Spec,
    teacher: Spec,
    templates: tuple[str | None, str | None] = (None, None),
    top_k: int | str,
    tolerance: float,
    speculation: SpeculationOption,
    connection_pool_size: int,
    max_retries: int,
    timeout: float,
) -> tuple[Mixing, HttpEngine]:
    """See `Pair.http`."""
    k = parse_top_k(top_k)
    require_speculation(speculation)
    if k is None:
        if speculation not in ("auto", "off", 0):
            raise InvalidRequest(
                f'speculation is {speculation} and top_k is "auto".',
                "Drafts need lists of one length: give top_k a number, or leave speculation at auto.",
            )
        speculation = "off"
    for name, value in (
        ("connection_pool_size", connection_pool_size),
        ("timeout", timeout),
        ("tolerance", tolerance),
        ("max_retries", max_retries + 1),
    ):
        if not value > 0:
            raise InvalidRequest(f"{name} is too small.", "max_retries may be 0, the others must be more.")
    addresses = (Address.of("base", base, templates[0]), Address.of("teacher", teacher, templates[1]))
    client = Client(pool=connection_pool_size, timeout=timeout, retries=max_retries)
    try:
        sides = open_sides(client, addresses, k)
        mixing = Mixing(sides[0].model, sides[1].model)
        mixing.require_mixable()
        draft_length = open_drafting(client, sides[0], speculation)
        return mixing, open_engine(client, mixing, sides, top_k=k, tolerance=tolerance, draft_length=draft_length)
    except BaseException:
        client.close()
        raise


@contextmanager
def handshake(
    base: Sequence[str],
    teacher: Sequence[str],
    *,
    top_k: int | str,
    base_model: str | None,
    teacher_model: str | None,
    base_tokenizer: str | None,
    teacher_tokenizer: str | None,
    base_api_key: str | None,
    teacher_api_key: str | None,
    chat_template: tuple[str | None, str | None] = (None, None),
) -> Iterator[tuple[Served, Served]]:
    """Both sides without an engine, for as long as the block runs."""
    addresses = (
        Address.of("base", (base, base_model, base_tokenizer, base_api_key), chat_template[0]),
        Address.of("teacher", (teacher, teacher_model, teacher_tokenizer, teacher_api_key), chat_template[1]),
    )
    client = Client(pool=100, timeout=30.0, retries=3)
    try:
        yield open_sides(client, addresses, parse_top_k(top_k))
    finally:
        client.close()


def parse_top_k(given: int | str) -> int | None:
    """A fixed number of log-probabilities, None for "auto".

    Raises:
        InvalidRequest: anything else.
    """
    if given == "auto":
        return None
    if isinstance(given, str) or given < 1:
        raise InvalidRequest(f"top_k is {given!r}.", 'It must be at least 1, or "auto".')
    return given


def open_sides(client: Client, addresses: tuple[Address, Address], top_k: int | None) -> tuple[Served, Served]:
    """Shakes hands with every server and makes the two models.

    Raises:
        ServerUnavailable, ModelUnavailable, InvalidRequest, PairMismatch: what makes the servers unusable.
    """
    facts = client.run(_all_facts(client, addresses, top_k))
    base, teacher = (_open_side(client, *both) for both in zip(SIDES, addresses, facts, strict=True))
    _require_agreement(base.model, teacher.model)
    return base, teacher


def open_drafting(client: Client, base: Served, asked: SpeculationOption) -> DraftLength:
    """How many tokens to draft, once the base's servers have shown that they can.

    Raises:
        ServerUnavailable: they cannot, and a number was asked for.
    """
    if asked in ("off", 0):
        return DraftLength(asked)
    for facts in base.facts:
        reason = client.run(why_no_drafts(client, facts))
        if reason is None:
            continue
        if asked != "auto":
            message = f"The {facts.endpoint.name} cannot draft for speculation: {reason}."
            raise ServerUnavailable(message, "Use another server, or turn speculation off.")
        log.warning("The %s cannot draft, so there is no speculation: %s.", facts.endpoint.name, reason)
        return DraftLength("off")
    return DraftLength(asked)


def open_engine(
    client: Client,
    mixing: Mixing,
    sides: tuple[Served, Served],
    *,
    top_k: int | None,
    tolerance: float,
    draft_length: DraftLength,
) -> HttpEngine:
    """The engine over sides that `open_sides` opened; `top_k` None adapts to the tolerance."""
    most = min(side.max_logprobs for side in sides)
    start = min(top_k or DEFAULT_LOGPROBS, most)
    drafts = max(start, min(DRAFT_LOGPROBS, most))
    width = Width(start, most, drafts, tolerance if top_k is None else None)
    models = [
        EngineModel(
            Side(client, [(facts.endpoint, facts.model) for facts in side.facts]), side.model.logit_size, side.scores
        )
        for side in sides
    ]
    return HttpEngine(
        client,
        models[0],
        models[1],
        vocabulary=mixing.alignment.size,
        width=width,
        draft_length=draft_length,
        blocking_text=isinstance(sides[1].model, ServedModel),
    )


async def _all_facts(client: Client, addresses: tuple[Address, Address], top_k: int | None) -> list[tuple[Facts, ...]]:
    """The facts of each side's replicas, all asked at once; the first failure is raised."""
    shakes = [
        [shake_hands(client, server, address.model, top_k) for server in address.servers] for address in addresses
    ]
    found = iter(await asyncio.gather(*shakes[0], *shakes[1]))
    return [tuple(next(found) for _ in address.servers) for address in addresses]


def _open_side(client: Client, side: str, address: Address, facts: tuple[Facts, ...]) -> Served:
    sizes = {f.logit_size for f in facts}
    if len(sizes) > 1:
        shown = ", ".join(f"{f.endpoint.name} has {f.logit_size} ids" for f in facts)
        raise PairMismatch(f"The {side} servers serve different models: {shown}.")
    first = facts[0]
    max_context = min(f.max_context for f in facts)
    checkpoint = _files(address, first)
    if checkpoint is not None:
        if first.tokenizes:
            _require_its_own(client, first, checkpoint)
        return Served(facts, FilesOfServed(checkpoint, first.logit_size, max_context))
    if not first.tokenizes:
        raise ModelUnavailable(
            f"The {first.endpoint.name} offers no /tokenize, and its tokenizer files are not here.",
            f"Give --{side}-tokenizer FOLDER.",
        )
    if address.template is not None:
        raise InvalidRequest(
            f"The {side}'s chat template {address.template!r} cannot be chosen on its server.",
            f"Give --{side}-tokenizer FOLDER, or start the server with --chat-template.",
        )
    return Served(facts, client.run(_ask_for_model(client, first, max_context)))


async def _ask_for_model(client: Client, facts: Facts, max_context: int) -> ServedModel:
    try:
        specials, template = await asyncio.gather(special_ids(client, facts), has_chat_template(client, facts))
        candidates = specials | (await templated_ids(client, facts) if template else frozenset())
        stops = await stop_ids(client, facts, candidates)
    except CallFailed as failure:
        raise unavailable(facts.endpoint, failure) from failure
    return ServedModel(client, facts.endpoint, facts.model, stops, specials, facts.logit_size, max_context, template)


def _files(address: Address, facts: Facts) -> Checkpoint | None:
    """Tokenizer files that the user named, or those of a server on this machine."""
    if address.tokenizer is not None:
        return Checkpoint.open(address.tokenizer, address.template)
    if (Path(facts.root) / "tokenizer.json").is_file() and find_spec("transformers") is not None:
        return Checkpoint.open(facts.root, address.template)
    return None


def _require_its_own(client: Client, facts: Facts, checkpoint: Checkpoint) -> None:
    """Refuses tokenizer files that are not the server's."""
    try:
        theirs = client.run(probe_tokens(client, facts))
    except CallFailed as failure:
        raise unavailable(facts.endpoint, failure) from failure
    if theirs != [checkpoint.encode(text) for text in PROBE_TEXTS]:
        raise PairMismatch(
            f"The tokenizer files in {checkpoint.name} are not those of the {facts.endpoint.name}.",
            "Give the folder of the model that is served there.",
        )


def _require_agreement(base: Model, teacher: Model) -> None:
    """Refuses two models whose tokenizers give different ids, special ones aside."""
    special = {*base.special_ids, *teacher.special_ids, *base.stop_ids, *teacher.stop_ids}
    for text in PROBE_TEXTS:
        first, second = ([i for i in model.encode(text) if i not in special] for model in (base, teacher))
        if first != second:
            at = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
            raise PairMismatch(
                f"The tokenizers disagree: {text[:24]!r}… is {first[at : at + 4]} for the base from its token {at} on, "
                f"{second[at : at + 4]} for the teacher.",
                "Mixing needs two models with one tokenizer.",
            )
