"""What must hold for rollouts from q* to be right in slime: each refusal says what to change.

Knows the arguments of slime 0.3.1.
"""

from __future__ import annotations

from typing import Any

from midlogit.errors import InvalidRequest

ALPHA_RULE = "midlogit_alpha_rule"


def require_servers(args: Any) -> list[str]:
    """The addresses of the midlogit servers that slime samples from.

    Raises:
        InvalidRequest: there are none.
    """
    addresses: list[str] | None = args.rollout_external_engine_addrs
    if not addresses:
        raise InvalidRequest(
            "slime runs SGLang servers of its own, which know nothing of q*.",
            "Start `midlogit serve --train`, and name it by --rollout-external-engine-addrs HOST:PORT.",
        )
    return addresses


def require_correction(args: Any) -> None:
    """slime weighs rollouts by how likely the policy and q* are to draw them.

    Raises:
        InvalidRequest: it would train on them as if the policy had drawn them.
    """
    if not (args.use_tis or args.use_rollout_logprobs):
        raise InvalidRequest(
            "slime would train on rollouts of q* as if the policy had drawn them.",
            "Give --use-tis; or --use-rollout-logprobs, which clips the ratio to q* as PPO does.",
        )
    if args.update_weight_transport != "disk" or args.update_weight_mode != "full":
        raise InvalidRequest(
            "The server takes whole weights from files.",
            "Give --update-weight-mode full --update-weight-transport disk.",
        )


def require_replay(mask: list[list[int]] | None, top_p: float) -> None:
    """slime renormalises the policy over the nucleus that q* was held to, if it was.

    Raises:
        InvalidRequest: slime and the server disagree on whether there is one.
    """
    if (mask is None) != (top_p == 1.0):
        raise InvalidRequest(
            f"--rollout-top-p is {top_p:g}, and the server {'holds no' if mask is None else 'holds a'} nucleus.",
            "Leave the nucleus to --rollout-top-p.",
        )
