"""What would be silently wrong in verl is refused with a sentence, before anything is drawn."""

from __future__ import annotations

import asyncio

import pytest
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from midlogit import InvalidRequest
from midlogit.integrations.verl.checks import require_trainable
from midlogit.integrations.verl.manager import MidlogitAgentLoopManager
from midlogit.integrations.verl.options import Options
from midlogit.integrations.verl.pairs import open_pair
from tests.conftest import BASE
from tests.http.conftest import Urls
from tests.verl.runs import Replica, client_of, configured, roll_out

ROLLOUT, CORRECTION = "actor_rollout_ref.rollout", "algorithm.rollout_correction"
LORA = "actor_rollout_ref.model"
NOWHERE = "http://127.0.0.1:1/v1"


def check(*overrides: str) -> None:
    config = configured(NOWHERE, *overrides)
    rollout = config.actor_rollout_ref.rollout
    require_trainable(config, Options.of(rollout).params(rollout))


def test_the_recipe_is_fine() -> None:
    check()
    check(f"{ROLLOUT}.temperature=0.7")
    check(f"{LORA}.lora_rank=8", f"{LORA}.lora.merge=True")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([f"{ROLLOUT}.top_p=0.9"], "top_p is 0.9"),
        ([f"{ROLLOUT}.top_k=50"], "top_k is 50"),
        ([f"+{ROLLOUT}.repetition_penalty=1.1"], "repetition_penalty is 1.1"),
        ([f"{ROLLOUT}.temperature=0"], "temperature is 0"),
        ([f"{ROLLOUT}.full_determinism=True"], "full_determinism"),
        ([f"{ROLLOUT}.calculate_log_probs=False"], "calculate_log_probs"),
        ([f"{ROLLOUT}.logprobs_mode=processed_logits"], "processed_logits"),
        (
            [f"{ROLLOUT}.logprobs_mode=raw_logprobs", f"{ROLLOUT}.temperature=0.7"],
            "raw_logprobs and rollout.temperature 0.7",
        ),
        ([f"{ROLLOUT}.name=sglang"], "sglang"),
        ([f"{ROLLOUT}.enable_rollout_routing_replay=True"], "routed experts"),
        ([f"{LORA}.lora_rank=8"], "LoRA"),
        ([f"{LORA}.lora.rank=8"], "LoRA"),
        ([f"{CORRECTION}.rollout_is=null"], "rollout_is is None"),
        (["algorithm.rollout_correction=null"], "rollout_is is None"),
        ([f"{CORRECTION}.rollout_is_threshold=null"], "count as the policy's own"),
        ([f"{CORRECTION}.bypass_mode=True"], "bypass_mode"),
        ([f"{ROLLOUT}.custom.midlogit.alpha_rule=equal-kl"], "inf nats in 8"),
        ([f"{ROLLOUT}.custom.midlogit.alpha_rule=kl-budget:0.2"], "1.6 nats in 8"),
        ([f"{ROLLOUT}.custom.midlogit.alpha_rule=halfway"], "Unknown α rule"),
        ([f"{ROLLOUT}.custom.midlogit.max_tv_bound=0"], "max_tv_bound"),
        ([f"+{ROLLOUT}.custom.midlogit.bound=0.1"], "bound"),
        ([f"{ROLLOUT}.custom.midlogit.teacher=null"], "teacher is missing"),
        ([f"{ROLLOUT}.val_kwargs.temperature=1.0"], "validation would sample"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_configurations_that_would_be_silently_wrong(overrides: list[str], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        check(*overrides)


def test_no_validation_may_sample_as_training_does() -> None:
    check(f"{ROLLOUT}.val_kwargs.temperature=1.0", "trainer.val_before_train=False")


def test_weights_per_token_are_called_biased() -> None:
    with pytest.warns(UserWarning, match="biased"):
        check(f"{CORRECTION}.rollout_is=token", f"{ROLLOUT}.custom.midlogit.alpha_rule=equal-kl")


def test_the_loop_refuses_before_a_server_is_asked() -> None:
    config = configured(NOWHERE, f"{ROLLOUT}.top_p=0.9")

    async def rolled() -> None:
        replica = Replica(NOWHERE)
        with pytest.raises(Exception, match=r"top_p is 0\.9"):
            await roll_out(config, replica)
        assert not replica.calls

    asyncio.run(rolled())


def test_the_recipes_manager_refuses_before_a_worker_starts(urls: Urls) -> None:
    async def create(teacher: str, *overrides: str) -> None:
        config = configured(teacher, *overrides)
        assert config.actor_rollout_ref.rollout.agent.agent_loop_manager_class.endswith(
            f"verl.manager.{MidlogitAgentLoopManager.__name__}"
        )
        await MidlogitAgentLoopManager.create(config, client_of(config, Replica(urls.base)))

    with pytest.raises(InvalidRequest, match="top_k"):
        asyncio.run(create(urls.teacher, f"{ROLLOUT}.top_k=50"))
    with pytest.raises(OSError, match=r"teacher http://127\.0\.0\.1:1/v1"):
        asyncio.run(create(NOWHERE))


def test_a_tokenizer_that_is_not_the_policys(urls: Urls) -> None:
    other = Tokenizer.from_str((BASE / "tokenizer.json").read_text())
    other.normalizer = normalizers.Lowercase()
    options = Options((urls.teacher,), None, 1.0)
    with pytest.raises(InvalidRequest, match="tokenizer elsewhere is not that"):
        open_pair(
            (urls.base,),
            options,
            PreTrainedTokenizerFast(tokenizer_object=other, name_or_path="elsewhere"),
        )
    open_pair((urls.base,), options, AutoTokenizer.from_pretrained(BASE)).close()
