"""Compares the figures in README and docs with the results they come from; knows texts and JSON, measures nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()
LOCAL, HTTP, VLLM, SPECULATION, BATCH, REPORT, TRAINING, VERL = (
    (ROOT / "docs" / f"{page}.md").read_text()
    for page in ("local", "http", "vllm", "speculation", "batch", "report", "training", "verl")
)


def results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(text: str, header: str) -> list[list[str]]:
    """The cells of the table whose first line begins with `header`."""
    lines = text[text.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def assert_is(written: str, value: float) -> None:
    """The first number of a text, rounded as it is written, is the value."""
    number = re.search(r"\d[\d,]*(\.\d+)?", written)
    assert number, written
    digits = number[0].replace(",", "")
    places = len(digits.partition(".")[2])
    assert abs(float(digits) - value) <= 0.5001 * 10**-places, f"{written!r} is {value:.4f}"


def assert_row(written: list[str], *values: float) -> None:
    assert len(written) == len(values)
    for cell, value in zip(written, values, strict=True):
        assert_is(cell, value)


def test_five_steps_of_verl() -> None:
    written = table(VERL, "| step | mean reward | mean weight | effective sample size | KL")
    for cells, row in zip(written, results("verl")["rows"], strict=True):
        figures = ("reward", "weight", "effective_sample_size", "kl_base", "alpha")
        assert_row(cells, row["step"], *(row[name] for name in (*figures, "rollouts_s", "step_s")))


def test_scoring_on_vllm() -> None:
    rows = results("scoring")["rows"]
    for written, row in zip(table(VLLM, "| settings | seconds |"), rows, strict=True):
        ratios = row["ratio"], row["ratio_to_prompt_logprobs"]
        assert_row(written[1:], row["score_s"], *ratios)


def speculation(batch: int, gamma: int | str) -> float:
    rows = results("speculation_gpu")["rows"]
    return next(r["tokens_per_s"] for r in rows if (r["batch"], r["gamma"]) == (batch, gamma))


def mean_ms(row: dict[str, Any]) -> float:
    """Mean time of a round, over all γ."""
    rounds = row["rounds_by_gamma"].values()
    return sum(r["rounds"] * r["mean_ms"] for r in rounds) / sum(r["rounds"] for r in rounds)


def test_parts_of_a_step_are_no_more_than_the_step() -> None:
    steps = [(row["pair_ms"], row.get("pair_step_parts_ms", {})) for row in results("gpu")["rows"]]
    steps += [
        (mean_ms(row), row.get("step_parts_ms", {})) for row in results("speculation_gpu")["rows"]
    ]
    for step_ms, parts_ms in steps:
        assert sum(parts_ms.values()) <= 1.02 * step_ms


def test_steps_of_the_pair_on_a_gpu() -> None:
    rows = results("gpu")["rows"]
    ratios = [row["pair_ms"] / (row["base_ms"] + row["teacher_ms"]) for row in rows]
    for cells, row, ratio in zip(table(VLLM, "| batch | 4B alone"), rows, ratios, strict=True):
        assert_row(
            cells, row["batch"], row["base_ms"], row["teacher_ms"], row["pair_ms"], ratio, row["tokens_per_s"]
        )  # fmt: skip


def test_speed_in_the_readme() -> None:
    """Columns are numbers of sequences, rows are quantities."""
    batches = [row["batch"] for row in results("gpu")["rows"]]
    alone = {
        row["batch"]: row["teacher_tokens_per_s"] for row in results("speculation_gpu")["rows"]
    }
    pair = {batch: speculation(batch, "auto") for batch in batches}

    header = next(line for line in README.splitlines() if line.startswith("| Qwen3-4B + Qwen3-14B"))
    assert_row(header.strip("|").split("|")[1:], *batches)

    over_sum, teacher, both, over_teacher = (cells[1:] for cells in table(README, header))
    assert_row(
        over_sum,
        *(row["pair_ms"] / (row["base_ms"] + row["teacher_ms"]) for row in results("gpu")["rows"]),
    )
    assert_row(teacher, *(alone[batch] for batch in batches))
    assert_row(both, *pair.values())
    assert_row(over_teacher, *(pair[batch] / alone[batch] for batch in batches))


def test_share_of_solver_and_draw() -> None:
    rows = results("gpu")["rows"]
    constrained, free = (
        100 * max(row[f"{name}_ms"] / row["pair_ms"] for row in rows)
        for name in ("solve_constrained", "solve")
    )
    said = re.search(r"at most ([\d.]+)% without the constraint and ([\d.]+)% with", VLLM)
    assert said
    assert_row(list(said.groups()), free, constrained)


@pytest.mark.skipif(
    not (RESULTS / "fused.json").exists(), reason="python -m benchmarks.fused, on a GPU, writes it"
)
def test_decisions_on_a_gpu() -> None:
    rows = results("fused")["rows"]
    peaked, flat = ([row for row in rows if row["rows"] == kind] for kind in ("peaked", "flat"))
    names = ["batch", "read_ms", "draft_ms", "solve_ms", "solve_constrained_ms", "torch_solve_ms"]
    names += [f"solve_top_{most}_ms" for most in (1, 20, 256)]
    for cells, row in zip(table(VLLM, "| batch | read"), peaked, strict=True):
        assert_row(cells, *(row[name] for name in names))
    said = re.search(
        r"take ([\d.]+) times as long as \*read\*, and ([\d.]+) times with the constraint.*?"
        r"take ([\d.]+) ms with the constraint, ([\d.]+) times",
        VLLM,
        re.DOTALL,
    )
    assert said
    free, constrained = (peaked[-1][name] / peaked[-1]["read_ms"] for name in names[3:5])
    unpeaked = flat[-1]["solve_constrained_ms"]
    assert_row(list(said.groups()), free, constrained, unpeaked, unpeaked / flat[-1]["read_ms"])


def test_tokens_with_drafts_on_a_gpu() -> None:
    alone = {
        row["batch"]: row["teacher_tokens_per_s"] for row in results("speculation_gpu")["rows"]
    }
    for cells in table(SPECULATION, "| batch | 14B alone"):
        batch = int(cells[0])
        lockstep, three, five, auto = (speculation(batch, gamma) for gamma in (0, 3, 5, "auto"))
        ratios = five / alone[batch], five / lockstep, auto / max(lockstep, three, five)
        assert_row(cells[1:], alone[batch], lockstep, three, five, auto, *ratios)


def test_guesses_on_a_gpu() -> None:
    kinds = [rows for name, rows in results("guesses_gpu").items() if ", batch " in name]
    settings = (0, False), (5, False), (5, True), ("auto", False), ("auto", True)
    for cells, rows in zip(table(SPECULATION, "| text | sequences"), kinds, strict=True):
        rates = {(row["gamma"], row["guesses"]): row["tokens_per_s"] for row in rows}
        row = rows[-1]
        teacher, ratio = row["teacher_tokens_per_s"], row["ratio_to_teacher"]
        passes = row["base_passes_per_token"]
        assert_row(cells[1:], row["batch"], teacher, *map(rates.get, settings), ratio, passes)


def test_a_real_pair_in_the_readme() -> None:
    said = re.search(
        r"([\d.]+) on prompts about code; .*? runs at ([\d.]+) times the tokens/s", README
    )
    assert said
    law = {(row["preset"], row["gamma"]): row for row in results("speculation_real_gpu")["law"]}
    edits = results("guesses_gpu")["edits, batch 1"][-1]
    accepted = law["balanced", 5]["acceptance"]
    assert_row(list(said.groups()), accepted, edits["ratio_to_teacher"])


def test_law_of_a_real_pair_on_a_gpu() -> None:
    rows = [row for row in results("speculation_real_gpu")["law"] if row["gamma"] == 5]
    names = "acceptance", "mean_alpha", "kl_base", "kl_teacher"
    for cells, row in zip(table(SPECULATION, "| preset | acceptance"), rows, strict=True):
        drawn = [abs(row["drawn_minus_exact"][side][0]) for side in ("base", "teacher")]
        assert_row(cells[1:], *(row[name] for name in names), *drawn)


def test_speed_of_a_real_pair_on_a_gpu() -> None:
    document = results("speculation_real_gpu")
    for cells in table(SPECULATION, "| batch | 0.5B alone"):
        rows = {row["gamma"]: row for row in document["rows"] if row["batch"] == int(cells[0])}
        rates = {gamma: row["tokens_per_s"] for gamma, row in rows.items()}
        base, teacher = (
            1e3 * int(cells[0]) / document["alone"][side]["step_ms"][cells[0]]
            for side in ("base", "teacher")
        )
        ratios = rates[0] * (1 / base + 1 / teacher), rates["auto"] / rates[0]
        measured = base, teacher, *rates.values(), rows["auto"]["acceptance"]
        assert_row(cells[1:], *measured, *ratios, rates["auto"] / teacher)


def test_drafts_from_other_distributions() -> None:
    names = ["base", *(f"min-p {share}" for share in (0.005, 0.02, 0.1))]
    names += ["top-p 0.9", "top-p 0.95", *(f"temperature {t}" for t in (0.7, 0.8, 0.9))]
    rows = {row["preset"]: row["acceptance"] for row in results("draft_distributions")["rows"]}
    for preset, *cells in table(SPECULATION, "| preset | the base itself"):
        assert_row(cells, *(rows[preset][name] for name in names))


def test_copies_of_the_base_as_drafters() -> None:
    names = [
        "overlap", "gumbel_max", "inverse_cdf", "gumbel_max_accepted", "inverse_cdf_accepted", "accepted",
    ]  # fmt: skip
    labels = {"FP8 copy": "float8", "bfloat16": "bfloat16"}
    rows = {(row["copy"], row["preset"]): row for row in results("copied_drafts")["rows"]}
    for label, preset, *cells in table(SPECULATION, "| in place of the base"):
        assert_row(cells, *(rows[labels[label], preset][name] for name in names))


def test_models_in_fp8() -> None:
    names = (
        "total_variation", "same_most_likely", "abs_change_alpha", "total_variation_base",
        "total_variation_teacher",
    )  # fmt: skip
    labels = {
        "both": "both in FP8",
        "base": "the base in FP8",
        "teacher": "the teacher in FP8",
        "rounding": "both in float32",
    }
    found = {(changed, preset): cells for changed, preset, *cells in table(VLLM, "| changed")}
    rows = results("fp8_shift")["rows"]
    assert len(found) == len(rows)
    for row in rows:
        cells = found[labels[row["changed"]], row["preset"]]
        assert_row(cells, *(row[name] for name in names))


@pytest.mark.parametrize(
    ("head", "name"), [("| sequences | base alone", "tp"), ("| V2, sequences", "tp_v2")]
)
def test_tensor_parallelism(head: str, name: str) -> None:
    for cells, row in zip(table(VLLM, head), results(name)["rows"], strict=True):
        names = "batch", "base_ms", "teacher_ms", "pair_ms"
        ratio = row["pair_ms"] / (row["base_ms"] + row["teacher_ms"])
        rates = row["gamma_tokens_per_s"], row["teacher_tokens_per_s"]
        assert_row(cells, *(row[name] for name in names), ratio, *rates)


def test_drafts_on_a_cpu() -> None:
    rows = {(row["preset"], row["drafts"]): row for row in results("speculation_cpu")["rows"]}
    for preset, *cells in table(SPECULATION, "| preset | lock-step"):
        ratios = [rows[preset, drafts]["ratio_to_lock_step"] for drafts in (2, 4, "auto")]
        assert_row(
            cells, rows[preset, "off"]["tokens_per_s"], *ratios, rows[preset, 4]["acceptance"]
        )


def test_guesses_on_a_cpu() -> None:
    found = results("guesses_cpu")
    said = re.search(
        r"It costs the host ([\d.]+) µs .*? and ([\d.]+) µs within a copy.*?2,000 tokens ([\d.]+) ms .*?"
        r"take ([\d.]+) forwards of the base per token",
        SPECULATION,
        re.DOTALL,
    )
    assert said
    costs = found["us_per_sequence_and_round"]
    passes = found["edits"]["base_passes_per_token"]
    assert_row(
        list(said.groups()), costs["unlike"], costs["copied"], found["first_look_ms"], passes
    )


def test_the_real_pair_on_a_cpu() -> None:
    found = results("local")
    presets = [found["presets"][name] for name in ("balanced", "exploratory")]
    names = "mean_alpha", "mean_kl", "ratio_to_both_generates", "tokens_per_s"
    for (_, *cells), name in zip(table(LOCAL, "| | balanced"), names, strict=True):
        assert_row(cells, *(preset[name] for preset in presets))
    said = re.search(
        r"Peak memory was ([\d.]+) GB: ([\d.]+) GB of weights, ([\d.]+) GB of caches, and ([\d.]+)",
        LOCAL,
    )
    assert said
    memory = ("peak", "weights", "caches", "over_weights_and_caches")
    assert_row(list(said.groups()), *(found["memory"][f"{name}_gb"] for name in memory))


def test_two_servers() -> None:
    rows = results("http")["rows"]
    for cells, row in zip(table(HTTP, "| sequences | client overhead"), rows, strict=True):
        overhead, processor, speedup = cells[1:]
        assert_row(
            [overhead, processor], row["coordinator_ms_per_token"], row["processor_ms_per_token"]
        )

        measured = sorted(row["speedup_of_each_round"])[len(row["speedup_of_each_round"]) // 2]
        if speedup == "no faster":
            assert measured < 1.05
        else:
            assert_is(speedup, measured)


@pytest.mark.parametrize("cells", table(HTTP, "| delay |"), ids=" ".join)
def test_drafts_over_http(cells: list[str]) -> None:
    delay, temperature, drafts, calls, tokens, times = cells
    setting: int | str = "auto" if drafts.startswith("auto") else int(drafts)
    rows = {
        row["speculation"]: row
        for row in results("http_speculation")["rows"]
        if f"{row['delay_ms']} ms" == delay and row["temperature"] == float(temperature)
    }
    row, off = rows[setting], rows["off"]
    for written, name in ((calls, "calls_per_token"), (tokens, "tokens_per_s")):
        assert_is(written, row[name])
        assert_is(written.partition("(")[2], off[name])
    assert_is(times, row["times_lockstep"])
    if setting == "auto":
        assert drafts == f"auto ({row['drafts_in_use']['1']})"


def test_batch_jobs() -> None:
    sections = results("batch")
    rows = [*sections["cpu"]["rows"], *sections["gpu"]["rows"]]
    for cells, row in zip(table(BATCH, "| sequences at once |"), rows, strict=True):
        assert_row(cells[1:], row["call_tokens_per_s"], row["job_tokens_per_s"], row["ratio"])

    (both,) = sections["gpus"]["rows"]
    said = re.search(r"reach ([\d.]+) times the tokens/s of one \(([\d,]+) against ([\d,]+)", BATCH)
    assert said
    assert_row(
        list(said.groups()), both["speedup"], both["all_tokens_per_s"], both["one_tokens_per_s"]
    )

    for cells, row in zip(table(BATCH, "| rows |"), sections["memory"]["rows"], strict=True):
        assert_row(cells, row["rows"], row["tokens_per_completion"], row["peak_mb"])


def test_reports_of_a_million_rows() -> None:
    said = re.search(
        r"take ([\d.]+) s of one\sprocessor and ([\d.]+) GB, two such runs compared ([\d.]+) s and ([\d.]+)",
        REPORT,
    )
    assert said
    one, two = results("report")["rows"]
    assert_row(
        list(said.groups()),
        *(row[name] for row in (one, two) for name in ("processor_s", "peak_gb")),
    )


def test_gradients_of_trl() -> None:
    rows = table(TRAINING, "| rollouts, TRL's weights |")
    for (arm, *cells), (name, row) in zip(rows, results("trl_gradient").items(), strict=True):
        assert arm == name
        assert_row(cells, row["length"], row["cosine"], row["z"])


def test_learning_curves() -> None:
    curves = results("training")

    def at(arm: str, curve: str, step: int) -> float:
        points = curves[arm][curve]
        return points["values"][points["steps"].index(step)]

    arms = ("own", "quarter-nat", "nat", "token")
    for cells, arm in zip(table(TRAINING, "| rollouts | TRL's weights |"), arms, strict=True):
        places = [(seed, step) for step in (10, 20, 40) for seed in (0, 1)]
        values = [at(f"grpo-{arm}-{seed}", "policy/success", step) for seed, step in places]
        assert_row(cells[2:], *values)

    for cells, arm in zip(
        table(TRAINING, "| states of |"), ("own", "middle", "teacher"), strict=True
    ):
        per_token = [at(f"distill-{arm}", "student/kl_per_token", n) for n in (0, 20, 40, 80)]
        assert_row(cells[1:], *per_token, at(f"distill-{arm}", "student/kl_per_text", 80))


def test_trainer_and_server_on_two_gpus() -> None:
    row = results("two_gpus")
    assert row["syncs_equal"]
    said = re.search(r"take ([\d.]+) s, and the server gives ([\d,]+) tokens/s", TRAINING)
    assert said
    assert_row(
        list(said.groups()), sum(row["sync_s"]) / row["steps"], row["tokens_per_s_of_rollouts"]
    )


def test_two_gpus_with_tensor_parallelism() -> None:
    rows = results("tp")["rows"]
    for cells, row in zip(table(VLLM, "| sequences | base alone |"), rows, strict=True):
        alone = row["base_ms"] + row["teacher_ms"]
        assert_row(
            cells,
            row["batch"],
            row["base_ms"],
            row["teacher_ms"],
            row["pair_ms"],
            row["pair_ms"] / alone,
            row["gamma_tokens_per_s"],
            row["teacher_tokens_per_s"],
        )
