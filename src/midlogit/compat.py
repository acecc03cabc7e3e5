"""The names of the older dual-server coordinator, for code that still uses them; each delegates to Pair.

"theta" is the base and "t" the teacher. New code uses `Pair.http` and `SamplingParams`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from midlogit.errors import EngineFailure
from midlogit.outputs import Completion, Diagnostics
from midlogit.pair import Pair
from midlogit.params import SamplingParams
from midlogit.requests.prompts import Prompt


@dataclass(frozen=True, slots=True)
class EnhancedCoordinatorConfig:
    """Servers and mixture in one, as in the older coordinator."""

    theta_url: str
    t_url: str
    top_k: int = 20
    alpha_tol: float = 1e-6
    force_first_token: bool = True
    constraint_to_target: bool = True
    target_top_p: float = 0.95
    exclude_special_tokens: bool = True
    special_token_ids: tuple[int, ...] | None = None
    connection_pool_size: int = 100
    max_retries: int = 3
    enable_logging: bool = False


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """One completion under the older names; the histories are empty unless diagnostics were asked for."""

    generated_text: str
    generated_tokens: list[int]
    alpha_history: list[float]
    kl_theta_history: list[float]
    kl_t_history: list[float]
    ess_ratio_history: list[float]
    entropy_history: list[float]
    error: str | None = None


class EnhancedDualVLLMCoordinator:
    """An asynchronous context manager around a Pair of two servers."""

    def __init__(self, config: EnhancedCoordinatorConfig) -> None:
        self.config = config
        self._pair: Pair | None = None

    async def __aenter__(self) -> Self:
        c = self.config
        if c.enable_logging:
            logging.getLogger("midlogit").setLevel(logging.INFO)
        self._pair = await asyncio.to_thread(
            Pair.http, c.theta_url, c.t_url, top_k=c.top_k,
            connection_pool_size=c.connection_pool_size, max_retries=c.max_retries,
        )  # fmt: skip
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pair is not None:
            await asyncio.to_thread(self._pair.close)

    async def generate_batch(
        self, prompts: Sequence[Prompt], max_tokens: int = 100, temperature: float = 1.0,
        return_diagnostics: bool = True,
    ) -> list[GenerationResult]:  # fmt: skip
        return await self.generate_batch_dual_prompts(
            prompts, prompts, max_tokens, temperature, return_diagnostics
        )

    async def generate_batch_dual_prompts(
        self, prompts_theta: Sequence[Prompt], prompts_t: Sequence[Prompt], max_tokens: int = 100,
        temperature: float = 1.0, return_diagnostics: bool = True,
    ) -> list[GenerationResult]:  # fmt: skip
        c = self.config
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, alpha_tol=c.alpha_tol,
            force_first_token=c.force_first_token, constraint_to_target=c.constraint_to_target,
            target_top_p=c.target_top_p, exclude_special_tokens=c.exclude_special_tokens,
            special_token_ids=c.special_token_ids or (),
        )  # fmt: skip
        found = await self._opened.agenerate(
            base_prompts=prompts_theta, teacher_prompts=prompts_t, params=params
        )
        return [_result(completion, return_diagnostics) for completion in found]

    def get_statistics(self) -> dict[str, float]:
        return self._opened.statistics()

    @property
    def _opened(self) -> Pair:
        if self._pair is None:
            raise EngineFailure("The coordinator is not open.", "Use it in an `async with` block.")
        return self._pair


async def generate_with_dual_prompts(
    theta_url: str, t_url: str, prompts_theta: Sequence[Prompt], prompts_t: Sequence[Prompt],
    max_tokens: int = 100, temperature: float = 1.0, **settings: Any,
) -> list[GenerationResult]:  # fmt: skip
    """Opens the servers, generates, closes; `settings` are those of EnhancedCoordinatorConfig."""
    async with EnhancedDualVLLMCoordinator(
        EnhancedCoordinatorConfig(theta_url, t_url, **settings)
    ) as coordinator:
        return await coordinator.generate_batch_dual_prompts(
            prompts_theta, prompts_t, max_tokens, temperature
        )


def _result(completion: Completion, diagnostics: bool) -> GenerationResult:
    d = completion.diagnostics if diagnostics else Diagnostics()
    histories = (d.alpha, d.kl_base, d.kl_teacher, d.ess_ratio, d.entropy, completion.error)
    return GenerationResult(completion.text, completion.token_ids, *histories)
