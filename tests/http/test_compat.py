"""The older coordinator's names give what Pair gives."""

from __future__ import annotations

import asyncio

import pytest

from midlogit import EngineFailure
from midlogit.compat import (
    EnhancedCoordinatorConfig,
    EnhancedDualVLLMCoordinator,
    generate_with_dual_prompts,
)
from tests.http.conftest import Urls


def test_the_older_names(urls: Urls) -> None:
    config = EnhancedCoordinatorConfig(
        theta_url=urls.base,
        t_url=urls.teacher,
        top_k=20,
        alpha_tol=1e-6,
        force_first_token=True,
        constraint_to_target=True,
        target_top_p=0.9,
        exclude_special_tokens=True,
        special_token_ids=(50,),
        connection_pool_size=50,
        max_retries=2,
        enable_logging=True,
    )

    async def run() -> None:
        coordinator = EnhancedDualVLLMCoordinator(config)
        with pytest.raises(EngineFailure, match="async with"):
            coordinator.get_statistics()
        async with coordinator:
            one, two = await coordinator.generate_batch(
                ["a fox", "a dog"], 5, 0, return_diagnostics=True
            )
            assert one.generated_text and 0 < len(one.generated_tokens) <= 5
            histories = (
                one.alpha_history,
                one.kl_theta_history,
                one.kl_t_history,
                one.ess_ratio_history,
            )
            assert {len(h) for h in (*histories, one.entropy_history)} == {
                len(one.generated_tokens)
            }
            assert one.alpha_history[0] == 1.0
            (other,) = await coordinator.generate_batch_dual_prompts(
                ["a fox"], ["a fox"], 5, 0, False
            )
            assert (other.generated_tokens, other.alpha_history) == (one.generated_tokens, [])
            assert coordinator.get_statistics()["total_requests"] == 3
        (third,) = await generate_with_dual_prompts(
            urls.base,
            urls.teacher,
            ["a fox"],
            ["a fox"],
            5,
            0,
            special_token_ids=(50,),
            target_top_p=0.9,
        )
        assert third.generated_tokens == one.generated_tokens
        assert two.error is None

    asyncio.run(run())
