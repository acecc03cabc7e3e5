"""What to look at before training on a run: findings in words, each with the number behind it; knows numbers only."""

from __future__ import annotations

from typing import Literal, NamedTuple

from midlogit.report.numbers import Numbers
from midlogit.report.picture import percent

# Shares above which, or for the ESS below which, a finding is one to look at.
MOST_ABOVE, MOST_CUT, MOST_REPEATED = 0.001, 0.10, 0.10
MOST_IDENTICAL, MOST_AT_ENDS, MOST_BOUND, LEAST_ESS = 0.05, 0.05, 0.1, 0.01


class Check(NamedTuple):
    """A finding.

    Attributes:
        state: "good", "look" at it, or "bad".
    """

    name: str
    state: Literal["good", "look", "bad"]
    says: str


def checks(run: Numbers) -> list[Check]:
    """The findings of a run, in the order of its sections."""
    if not run["head"]["completions"]:
        return []
    found = [_complete(run)]
    if run["alpha"] and run["alpha"]["mean"]["count"]:
        found += [_ends(run), *_self_test(run)]
    if run["ess"] and run["ess"]["sequences"]["count"] > 1:
        found.append(_weights(run))
    if run["lengths"] and run["lengths"]["mean"]["count"]:
        found += [_cut(run), _repeats(run)]
    if run["exactness"]:
        found.append(_exact(run))
    return [*found, _errors(run)]


def _complete(run: Numbers) -> Check:
    head = run["head"]
    done, planned = head["completions"], head["planned"]
    if done >= planned:
        return Check("Complete", "good", f"All {planned:,} completions are there.")
    return Check(
        "Not complete",
        "look",
        f"{done:,} of {planned:,} completions; the rest may change every number.",
    )


def _ends(run: Numbers) -> Check:
    at_base, at_teacher = run["alpha"]["at_base"] or 0.0, run["alpha"]["at_teacher"] or 0.0
    mean = run["alpha"]["mean"]["mean"]
    says = f"Mean α is {mean:.3f}; {percent(at_base)} of tokens lie at the base, {percent(at_teacher)} at the teacher."
    if run["rule"] not in (None, "equal-kl"):
        return Check(f"α by {run['rule']}", "good", says)
    if at_base + at_teacher > MOST_AT_ENDS:
        return Check("α at its ends", "look", says)
    return Check("α is inside", "good", says)


def _self_test(run: Numbers) -> list[Check]:
    test = run["kl"]["self_test"]
    if not test["applies"] or not test["tested"]:
        return []
    says = f"|KL base − KL teacher| is above {test['tolerance']:g} at {percent(test['above'])} of tokens."
    if run["head"]["diagnostics"] == "compact":
        return [
            Check(
                "Equal KL",
                "good",
                f"{says} Diagnostics are rounded to 16 bits, which is more than that.",
            )
        ]
    if test["above"] > MOST_ABOVE:
        return [Check("KLs are unequal", "bad", says)]
    return [Check("Equal KL", "good", says)]


def _weights(run: Numbers) -> Check:
    share = run["ess"]["sequences"]
    says = (
        f"Weights of whole completions have an ESS of {percent(share['base'])} towards the base and "
        f"{percent(share['teacher'])} towards the teacher."
    )
    if min(share["base"], share["teacher"]) < LEAST_ESS:
        return Check("Correct by token, not by sequence", "look", says)
    return Check("Sequence weights hold", "good", says)


def _cut(run: Numbers) -> Check:
    finished = run["lengths"]["finish_reasons"]
    share = finished.get("length", {}).get("share", 0.0)
    mean = run["lengths"]["mean"]["mean"]
    says = f"{percent(share)} of completions reached max_tokens; mean length {mean:.1f} tokens."
    return Check("Cut off", "look", says) if share > MOST_CUT else Check("Texts end", "good", says)


def _repeats(run: Numbers) -> Check:
    repeated = run["lengths"]["repetition"]["mean"] or 0.0
    identical = run["lengths"]["identical"]["share"]
    says = f"{percent(repeated)} of 4-grams repeat inside a completion"
    if identical is not None:
        says += f"; {percent(identical)} of completions say what another of their prompt says"
    is_bad = repeated > MOST_REPEATED or (identical or 0.0) > MOST_IDENTICAL
    return Check("Repetition", "look" if is_bad else "good", f"{says}.")


def _exact(run: Numbers) -> Check:
    section = run["exactness"]
    if section["is_exact"]:
        return Check(
            "Exact",
            "good",
            "Both models' whole vocabularies were seen: the sampled law is q* itself.",
        )
    bound = section["whole_texts"]["mean"] or 0.0
    if bound >= 1:
        says = f"E[Σ bound] over a text is {bound:.3g}; above 1 it proves nothing. Widen the lists by --top-k."
        return Check("Truncated lists", "look", says)
    says = f"The law of whole texts is proved to be within {bound:.3g} of the exact one in total variation."
    return Check("Truncated lists", "look" if bound > MOST_BOUND else "good", says)


def _errors(run: Numbers) -> Check:
    count, share = run["errors"]["count"], run["errors"]["share"]
    if not count:
        return Check("No errors", "good", "No row ended as an error.")
    return Check(
        "Error rows",
        "look",
        f"{count:,} completions ({percent(share)}) are errors and in no other section.",
    )
