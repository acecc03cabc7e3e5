"""Ways in which a server's answer of log-probabilities can be wrong: each changes a decoded answer of /completions."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

Lists = list[dict[str, Any]]  # the lists of one choice, by token


def _with_lists(change: Callable[[Lists], Any]) -> Callable[[Any], Any]:
    """A change to the lists of the last choice."""

    def changed(answer: Any) -> Any:
        change(answer["choices"][-1]["logprobs"]["top_logprobs"])
        return answer

    return changed


def _with_first_value(value: Any) -> Callable[[Any], Any]:
    """Another value of one id."""
    return _with_lists(lambda lists: lists[0].update({next(iter(lists[0])): value}))


def _with_first_key(name: Callable[[str], str]) -> Callable[[Any], Any]:
    """Another id of one value."""

    def rename(lists: Lists) -> None:
        first, *_ = lists[0]
        value = lists[0].pop(first)
        lists[0][name(first)] = value

    return _with_lists(rename)


def _with_choices(change: Callable[[list[Any]], Any]) -> Callable[[Any], Any]:
    def changed(answer: Any) -> Any:
        change(answer["choices"])
        return answer

    return changed


def _replace_all(lists: Lists, value: float) -> None:
    for values in lists:
        values.update(dict.fromkeys(values, value))


def _index_twice(choices: list[Any]) -> None:
    choices[-1]["index"] = 0 if len(choices) > 1 else 1


DAMAGE: dict[str, Callable[[Any], Any]] = {
    "null value": _with_first_value(None),
    "text value": _with_first_value("-1.5"),
    "value above 0": _with_first_value(0.5),
    "value below vLLM's lowest": _with_first_value(-1e6),
    "NaN": _with_first_value(float("nan")),
    "infinite value": _with_first_value(float("inf")),
    "all certain": _with_lists(lambda lists: _replace_all(lists, 0.0)),
    "all impossible": _with_lists(lambda lists: _replace_all(lists, -9999.0)),
    "null list": _with_lists(lambda lists: lists.__setitem__(0, None)),
    "empty list": _with_lists(lambda lists: lists[0].clear()),
    "no list": _with_lists(lambda lists: lists.clear()),
    "a list too many": _with_lists(lambda lists: lists.append(lists[0])),
    # Two: a list of drafts may hold one more than was asked for.
    "ids short": _with_lists(lambda lists: [lists[0].popitem() for _ in range(2)]),
    "ids too many": _with_lists(
        lambda lists: [lists[0].setdefault(f"token_id:{i}", -99.0) for i in range(4000, 4004)]
    ),
    "id beyond the vocabulary": _with_first_key(lambda name: "token_id:4096"),
    "negative id": _with_first_key(lambda name: "token_id:-1"),
    "text in place of an id": _with_first_key(lambda name: " the"),
    "id twice": _with_lists(lambda lists: lists[0].update({_zeros(next(iter(lists[0]))): -9.0})),
    "null logprobs": _with_choices(lambda choices: choices[-1].update(logprobs=None)),
    "no choices": _with_choices(lambda choices: choices.clear()),
    "choices missing": lambda answer: {k: v for k, v in answer.items() if k != "choices"},
    "prompt too few": _with_choices(lambda choices: choices.pop()),
    "prompt too many": _with_choices(lambda choices: choices.append(deepcopy(choices[-1]))),
    "index twice": _with_choices(_index_twice),
    "index beyond": _with_choices(lambda choices: choices[-1].update(index=99)),
    "index null": _with_choices(lambda choices: choices[-1].update(index=None)),
    "another request's id": lambda answer: {**answer, "id": "cmpl-0"},
    "other prompts": lambda answer: {**answer, "usage": {"prompt_tokens": 1}},
    "not an object": lambda answer: [answer],
    "null": lambda answer: None,
}


def _zeros(name: str) -> str:
    """The same id, written otherwise."""
    return name.replace(":", ":00")
