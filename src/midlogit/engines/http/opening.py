"""Opens a pair from URLs: a handshake with every server, the tokenizers, their agreement.

Knows the order of the checks; each check is the handshake's, each text the models' own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from midlogit.engines.draft_length import DraftLength, SpeculationOption
from midlogit.engines.http.client import CallFailed, Client, Endpoint, unavailable
from midlogit.engines.http.engine import HttpEngine
from midlogit.engines.http.handshake import (
    DEFAULT_LOGPROBS,
    PROBE_TEXTS,
    ServerFacts,
    drafting_problem,
    has_chat_template,
    probe_tokens,
    shake_hands,
    special_ids,
    stop_ids,
    templated_ids,
)
from midlogit.engines.http.paired_sides import PairedSides, ServedSide
from midlogit.engines.http.replicas import ReplicaPool
from midlogit.engines.http.rounds import ListWidth
from midlogit.engines.http.served import ServedModel
from midlogit.engines.http.upstream import SIDES, Upstream
from midlogit.errors import InvalidRequest, ModelUnavailable, PairMismatch, ServerUnavailable
from midlogit.extras import has_transformers
from midlogit.kinds import require_count, require_kind
from midlogit.models.checkpoint import Checkpoint, Model
from midlogit.models.mixing import Mixing

log = logging.getLogger("midlogit")

DRAFT_LOGPROBS = 100  # per draft: as cheap as 20, and then few ids are left to score


@dataclass(frozen=True, slots=True)
class OpenedSide:
    """One side after the handshake: the facts of its replicas, and its model."""

    facts: tuple[ServerFacts, ...]
    model: Model

    @property
    def max_logprobs(self) -> int:
        return min(facts.max_logprobs for facts in self.facts)

    @property
    def scores(self) -> bool:
        return all(facts.scores for facts in self.facts)

    @property
    def verifies(self) -> bool:
        return all(facts.verifies for facts in self.facts)


def open_pair(
    base: Upstream,
    teacher: Upstream,
    *,
    top_k: int | str,
    tolerance: float,
    speculation: SpeculationOption,
    max_num_seqs: int,
    connection_pool_size: int,
    max_retries: int,
    timeout: float,
) -> tuple[Mixing, HttpEngine]:
    """See `Pair.http`."""
    require_count(max_num_seqs=max_num_seqs)
    require_kind("int", connection_pool_size=connection_pool_size, max_retries=max_retries)
    require_kind("float", timeout=timeout, tolerance=tolerance)
    k = parse_top_k(top_k)
    draft_length = DraftLength(speculation)
    if k is None:
        if speculation not in ("auto", "off", 0):
            raise InvalidRequest(
                f'speculation is {speculation} and top_k is "auto".',
                "Drafts need lists of one length: give top_k a number, or leave speculation at auto.",
            )
        draft_length = DraftLength("off")
    for name, value in (
        ("connection_pool_size", connection_pool_size),
        ("timeout", timeout),
        ("tolerance", tolerance),
        ("max_retries", max_retries + 1),
    ):
        if not value > 0:
            raise InvalidRequest(
                f"{name} is too small.", "max_retries may be 0, the others must be more."
            )

    client = Client(pool=connection_pool_size, timeout=timeout, retries=max_retries)
    try:
        sides = open_sides(client, (base, teacher), k)
        width = list_width(sides, k, tolerance)
        mixing = Mixing(sides[0].model, sides[1].model, width.maximum)
        mixing.require_mixable()

        draft_length = possible_draft_length(client, sides[0], draft_length)
        return mixing, open_engine(client, mixing, sides, width, draft_length, max_num_seqs)
    except BaseException:
        client.close()
        raise


@contextmanager
def handshake(
    base: Upstream, teacher: Upstream, top_k: int | str
) -> Iterator[tuple[OpenedSide, OpenedSide]]:
    """Both sides without an engine, for the duration of the block."""
    k = parse_top_k(top_k)
    client = Client(pool=100, timeout=30.0, retries=3)
    try:
        yield open_sides(client, (base, teacher), k)
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


def open_sides(
    client: Client, upstreams: tuple[Upstream, Upstream], top_k: int | None
) -> tuple[OpenedSide, OpenedSide]:
    """Shakes hands with every server of (base, teacher) and makes the two models.

    Raises:
        ServerUnavailable, ModelUnavailable, InvalidRequest, PairMismatch: the servers cannot be used.
    """
    endpoints = [upstream.endpoints(side) for side, upstream in zip(SIDES, upstreams, strict=True)]
    names = [upstream.model for upstream in upstreams]
    facts = client.run(_all_facts(client, endpoints, names, top_k))
    base, teacher = (
        _open_side(client, *of_side) for of_side in zip(SIDES, upstreams, facts, strict=True)
    )
    _require_agreement(base.model, teacher.model)
    return base, teacher


def possible_draft_length(client: Client, base: OpenedSide, wanted: DraftLength) -> DraftLength:
    """`wanted` where all servers of the base can draft, else no drafts.

    Raises:
        ServerUnavailable: one of them cannot, and a number was asked for.
    """
    if not wanted.choices:
        return wanted

    for facts in base.facts:
        reason = client.run(drafting_problem(client, facts))
        if reason is None:
            continue
        if wanted.fixed:
            message = f"The {facts.endpoint.name} cannot draft for speculation: {reason}."
            raise ServerUnavailable(message, "Use another server, or turn speculation off.")
        log.warning(
            "The %s cannot draft, so there is no speculation: %s.", facts.endpoint.name, reason
        )
        return DraftLength("off")
    return wanted


def list_width(
    sides: tuple[OpenedSide, OpenedSide], top_k: int | None, tolerance: float
) -> ListWidth:
    """The width of lists that both sides allow; `top_k` None adapts it to the tolerance."""
    maximum = min(side.max_logprobs for side in sides)
    start = min(top_k or DEFAULT_LOGPROBS, maximum)
    drafting = max(start, min(DRAFT_LOGPROBS, maximum))
    return ListWidth(start, maximum, drafting, tolerance if top_k is None else None)


def open_engine(
    client: Client,
    mixing: Mixing,
    sides: tuple[OpenedSide, OpenedSide],
    width: ListWidth,
    draft_length: DraftLength,
    max_num_seqs: int,
) -> HttpEngine:
    """The engine over sides that `open_sides` opened."""
    served = [
        ServedSide(
            ReplicaPool(client, side.facts),
            side.model.logit_size,
            side.scores,
            side.verifies,
        )
        for side in sides
    ]
    paired = PairedSides(served[0], served[1], mixing.alignment.size)
    blocking_text = isinstance(sides[1].model, ServedModel)
    return HttpEngine(
        client,
        paired,
        width,
        draft_length,
        served=sides[0].facts[0].root,
        max_num_seqs=max_num_seqs,
        blocking_text=blocking_text,
    )


async def _all_facts(
    client: Client,
    endpoints: list[tuple[Endpoint, ...]],
    names: list[str | None],
    top_k: int | None,
) -> list[list[ServerFacts]]:
    """The facts of each side's replicas, all probed at once; raises the first failure."""
    sides = [
        asyncio.gather(*(shake_hands(client, server, name, top_k) for server in replicas))
        for replicas, name in zip(endpoints, names, strict=True)
    ]
    return list(await asyncio.gather(*sides))


def _open_side(
    client: Client, side: str, upstream: Upstream, facts: list[ServerFacts]
) -> OpenedSide:
    sizes = {f.logit_size for f in facts}
    if len(sizes) > 1:
        shown = ", ".join(f"{f.endpoint.name} has {f.logit_size} ids" for f in facts)
        raise PairMismatch(f"The {side} servers serve different models: {shown}.")

    first = facts[0]
    max_context = min(f.max_context for f in facts)
    checkpoint = _tokenizer_files(upstream, first)
    if checkpoint is not None:
        if first.tokenizes:
            _require_same_tokenizer(client, first, checkpoint)
        model = replace(checkpoint, logit_size=first.logit_size, max_context=max_context)
        return OpenedSide(tuple(facts), model)

    if not first.tokenizes:
        raise ModelUnavailable(
            f"The {first.endpoint.name} offers no /tokenize, and its tokenizer files are not here.",
            f"Give --{side}-tokenizer FOLDER.",
        )
    if upstream.chat_template is not None:
        raise InvalidRequest(
            f"The {side}'s chat template {upstream.chat_template!r} cannot be chosen on its server.",
            f"Give --{side}-tokenizer FOLDER, or start the server with --chat-template.",
        )
    return OpenedSide(tuple(facts), client.run(_served_model(client, first, max_context)))


async def _served_model(client: Client, facts: ServerFacts, max_context: int) -> ServedModel:
    try:
        specials, template = await asyncio.gather(
            special_ids(client, facts), has_chat_template(client, facts)
        )
        candidates = specials | (await templated_ids(client, facts) if template else frozenset())
        stops = await stop_ids(client, facts, candidates)
    except CallFailed as failure:
        raise unavailable(facts.endpoint, failure) from failure
    return ServedModel(
        client,
        facts.endpoint,
        facts.model,
        stops,
        specials,
        facts.logit_size,
        max_context,
        template,
    )


def _tokenizer_files(upstream: Upstream, facts: ServerFacts) -> Checkpoint | None:
    """The tokenizer files that the user named, else those of a server on this machine."""
    if upstream.tokenizer is not None:
        return Checkpoint.open(
            upstream.tokenizer,
            upstream.chat_template,
            trust_remote_code=upstream.trust_remote_code,
        )
    if (Path(facts.root) / "tokenizer.json").is_file() and has_transformers():
        return Checkpoint.open(facts.root, upstream.chat_template)
    return None


def _require_same_tokenizer(client: Client, facts: ServerFacts, checkpoint: Checkpoint) -> None:
    """Refuses tokenizer files that give other ids than the server.

    Raises:
        PairMismatch: they do. ServerUnavailable: the server does not answer.
    """
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
    """Refuses two models whose tokenizers give different ids, special ones aside.

    Raises:
        PairMismatch: names the first difference.
    """
    special = {*base.special_ids, *teacher.special_ids, *base.stop_ids, *teacher.stop_ids}
    for text in PROBE_TEXTS:
        ours, theirs = (
            [i for i in model.encode(text) if i not in special] for model in (base, teacher)
        )
        if ours == theirs:
            continue

        at = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
        raise PairMismatch(
            f"The tokenizers disagree: {text[:24]!r}… is {ours[at : at + 4]} for the base from its token {at} on, "
            f"{theirs[at : at + 4]} for the teacher.",
            "Mixing needs two models with one tokenizer.",
        )
