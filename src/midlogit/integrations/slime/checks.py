"""What must hold for rollouts from q* to be right in slime: each refusal says what to change.

Knows the arguments of slime 0.3.1.
"""

from __future__ import annotations

from typing import Any

from midlogit.integrations.checks import require


def require_servers(args: Any) -> list[str]:
    """The addresses of the midlogit servers that slime samples from.

    Raises:
        InvalidRequest: there are none.
    """
    addresses: list[str] = args.rollout_external_engine_addrs or []
    require(
        bool(addresses),
        "slime runs SGLang servers of its own, which know nothing of q*.",
        "Start `midlogit serve --train`, and name it by --rollout-external-engine-addrs HOST:PORT.",
    )
    return addresses


def require_correction(args: Any) -> None:
    """slime weighs rollouts by how likely the policy and q* are to draw them, and the server gets the policy's weights.

    Raises:
        InvalidRequest: it would not, or would send weights in a way that the server does not know.
    """
    require(
        args.use_tis or args.use_rollout_logprobs,
        "slime would train on rollouts of q* as if the policy had drawn them.",
        "Give --use-tis; or --use-rollout-logprobs, which clips the ratio to q* as PPO does.",
    )
    require(
        (args.update_weight_mode, args.update_weight_transport) == ("full", "disk"),
        "The server takes whole weights from files.",
        "Give --update-weight-mode full --update-weight-transport disk.",
    )


def require_replay(mask: list[list[int]] | None, top_p: float) -> None:
    """slime renormalises the policy over the nucleus that q* was held to, if it was.

    Raises:
        InvalidRequest: slime and the server disagree on whether there is one.
    """
    require(
        (mask is None) == (top_p == 1.0),
        f"--rollout-top-p is {top_p:g}, and the server {'holds no' if mask is None else 'holds a'} nucleus.",
        "Leave the nucleus to --rollout-top-p.",
    )
