"""Every number of a report against pandas on the rows; a job and the lines of `generate --json` agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pandas as pd
import pytest

from midlogit import Pair, SamplingParams
from midlogit.report import make_report
from tests.report.conftest import PROMPTS, TOKENS, N
from tests.report.recomputed import frame_of, mean, numbers_of, same

SECTIONS = ("alpha", "kl", "ess", "lengths", "exactness")


@pytest.mark.parametrize("number", [0, 1], ids=["balanced", "exploratory"])
def test_every_number_is_that_of_the_rows(runs: tuple[Path, Path], number: int) -> None:
    found = orjson.loads(make_report(runs[number], deep=True).json())["runs"][0]
    rows = frame_of(runs[number])
    expected = numbers_of(rows)
    for section in SECTIONS:
        same(found.pop(section), expected[section], section)

    kinds = found["errors"].pop("kinds")
    same(found.pop("errors"), expected["errors"], "errors")
    assert sum(kind["count"] for kind in kinds) == expected["errors"]["count"] == N
    assert all(
        example["error"] in set(rows.error) for kind in kinds for example in kind["examples"]
    )

    same_head(found.pop("head"), rows, runs[number])
    same_texts(found.pop("texts"), rows)
    same_disagreements(found.pop("disagreements"), rows)
    assert found == {"rule": "equal-kl"}, "nothing is left that was not checked"


def same_head(head: dict[str, Any], rows: pd.DataFrame, run: Path) -> None:
    manifest = json.loads((run / "plan" / "manifest.json").read_text())
    job = head.pop("job")
    for name in ("fingerprint", "version", "created", "base", "teacher"):
        assert job.pop(name) == manifest[name]
    parameters = manifest["parameters"]
    assert job.pop("models") == {side: parameters[side] for side in ("base", "teacher")}
    assert job.pop("chat") == parameters["reading"]["chat"]
    assert job == {name: parameters[name] for name in ("engine", "dtype", "sampling", "inputs")}

    seconds, speed = head.pop("seconds"), head.pop("tokens_per_s")
    assert speed == pytest.approx(head["completion_tokens"] / seconds)
    assert head == {
        "name": run.name, "completions": len(rows), "rows": rows.row_id.nunique(), "planned": manifest["items"],
        "errors": rows.error.notna().sum(), "prompt_tokens": rows.prompt_tokens.sum(),
        "completion_tokens": rows.completion_tokens.sum(), "parts": manifest["parts"], "parts_done": manifest["parts"],
        "parts_open": 0, "summaries_remade": 0, "engine_deaths": 0, "workers": 0, "diagnostics": "full",
    }  # fmt: skip


def same_texts(texts: list[dict[str, Any]], rows: pd.DataFrame) -> None:
    """Texts are rows, and those at the extremes are the most extreme ones."""
    by_key = rows.set_index(["row_id", "sample"])
    done = rows[rows.error.isna()].set_index(["row_id", "sample"])
    towards = (done.sum_teacher_logprob - done.sum_base_logprob) / done.completion_tokens
    order = {
        "highest_kl": -done[["mean_kl_base", "mean_kl_teacher"]].max(axis=1),
        "nearest_base": towards,
        "nearest_teacher": -towards,
    }
    for text in texts:
        why, key, pieces = (
            text.pop("why"),
            (text.pop("row_id"), text.pop("sample")),
            text.pop("pieces"),
        )
        row = by_key.loc[key]
        assert "".join(pieces).strip() == row.text.strip()
        if why != "random":
            assert key in order[why].nsmallest(3).index
        for name, value in text.items():
            expected = row[name].tolist() if isinstance(row[name], np.ndarray) else row[name]
            assert (
                value == pytest.approx(expected, rel=1e-6)
                if isinstance(expected, float)
                else value == expected
            )


def same_disagreements(found: dict[str, Any], rows: pd.DataFrame) -> None:
    done = rows[rows.error.isna()]
    lists = [
        "token_ids",
        "alpha",
        "kl_base",
        "kl_teacher",
        "forced",
        "logprobs",
        "base_logprobs",
        "teacher_logprobs",
    ]
    tops = [
        f"top_{side}_{part}" for side in ("q", "base", "teacher") for part in ("ids", "logprobs")
    ]
    tokens = done[["row_id", "sample", *lists, *tops]].explode([*lists, *tops])
    tokens["position"] = np.concatenate([np.arange(len(ids)) for ids in done.token_ids])
    free = tokens[~tokens.forced.astype(bool)].copy()
    free["kl"] = free[["kl_base", "kl_teacher"]].astype(float).max(axis=1)
    most = free.nlargest(20, "kl")

    places = found["places"]
    assert [place["kl"] for place in places] == pytest.approx(most.kl.tolist())
    keyed = free.set_index(["row_id", "sample", "position"])
    for place in places:
        row = keyed.loc[place["row_id"], place["sample"], place["position"]]
        assert place["token_ids"][-1] == row.token_ids
        for name in ("alpha", "kl"):
            assert place[name] == pytest.approx(row[name])
        for name in ("logprob", "base_logprob", "teacher_logprob"):
            assert place[name] == pytest.approx(row[f"{name}s"])
        for side, candidates in place["candidates"].items():
            assert [lp for _, lp in candidates] == pytest.approx(
                row[f"top_{side}_logprobs"].tolist()
            )

    types = found["types"]
    assert (types["parts"], types["tokens"]) == (3, len(free))
    groups = free.astype({"kl_base": float, "alpha": float}).groupby("token_ids")
    often = groups.filter(lambda group: len(group) >= 50).groupby("token_ids")
    expected = often.agg(
        count=("kl_base", "size"), mean_kl=("kl_base", "mean"), mean_alpha=("alpha", "mean")
    )
    assert {entry["token_id"] for entry in types["types"]} == set(expected.index)
    for entry in types["types"]:
        row = expected.loc[entry["token_id"]]
        share = row["count"] * row.mean_kl / free.kl_base.astype(float).sum()
        assert (entry["count"], entry["mean_kl"]) == (
            row["count"],
            pytest.approx(row.mean_kl, rel=1e-5),
        )
        assert (entry["share"], entry["mean_alpha"]) == (
            pytest.approx(share, rel=1e-5), pytest.approx(row.mean_alpha, rel=1e-5)
        )  # fmt: skip


def test_lines_say_what_a_job_says(pair: Pair, tmp_path: Path) -> None:
    params = SamplingParams.preset("balanced", n=N, seed=5, max_tokens=TOKENS, top_logprobs=4)
    completions = pair.generate(PROMPTS, params, progress=False)
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b"".join(orjson.dumps(c.to_dict()) + b"\n" for c in completions))
    report = make_report(file, tokenizer=pair.mixing.teacher.name)
    (run,) = report.numbers["runs"]
    assert run["head"]["rows"] == len(PROMPTS) and run["head"]["job"] is None
    alphas = [
        (c.index, a)
        for c in completions
        for a, f in zip(c.diagnostics.alpha, c.diagnostics.forced, strict=True)
        if not f
    ]
    same(run["alpha"]["mean"], mean(pd.DataFrame(alphas, columns=["row_id", "alpha"]), "alpha"))
    assert "data-text" in report.page()

    without = make_report(file)
    assert without.numbers["runs"][0]["alpha"] == run["alpha"]
    assert 'class="strip"' in without.page(), "without a tokenizer, tokens are squares"


def test_a_broken_weight_total_of_no_token_in_common_is_counted(tmp_path: Path, pair: Pair) -> None:
    """Infinite divergences are null in JSON, and leave means alone."""
    (completion,) = pair.generate(["A fox"], SamplingParams(max_tokens=8, seed=1), progress=False)
    data = completion.to_dict()
    data["diagnostics"]["kl_base"][3] = float("inf")
    data["diagnostics"]["ess_base"][3] = float("inf")
    file = tmp_path / "lines.jsonl"
    file.write_bytes(orjson.dumps(data) + b"\n")
    run = make_report(file).numbers["runs"][0]
    assert run["kl"]["no_common_token"] == 1
    assert run["kl"]["base"]["mean"]["count"] == len(completion.token_ids) - 2
    assert run["head"]["rows"] == 1 and run["alpha"]["mean"]["low"] is None
