"""Tasks of lm-evaluation-harness made from local rows, a run of them, and their scores by a pair; knows no server."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from midlogit import Pair, SamplingParams

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lm_eval
    import lm_eval.models.openai_completions
    from lm_eval.tasks import TaskManager

ROWS = [
    {
        "question": "Once upon a time there was a",
        "choices": [" little girl", " stone moon", " xylophone"],
        "gold": 0,
    },
    {
        "question": "The dog ran to the",
        "choices": [" park", " spoon", " zebra crossing"],
        "gold": 0,
    },
    {"question": "She was very", "choices": [" purple tooth", " happy", " because"], "gold": 1},
]
COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
target_delimiter: ""
"""
TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}]
""",
    "local_last": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{choices[gold]}}"
metric_list: [{metric: acc}, {metric: perplexity}]
""",
    "local_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}{{choices[gold]}}"
metric_list: [{metric: byte_perplexity}]
""",
    "local_generate": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
""",
}


def write_tasks(folder: Path) -> TaskManager:
    """Writes the rows and `TASKS` into a folder, and returns what finds them there."""
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    for name, own in TASKS.items():
        (folder / f"{name}.yaml").write_text(COMMON.format(name=name, folder=folder) + own)
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(manager: TaskManager, model: str, *tasks: str, **arguments: Any) -> dict[str, Any]:
    """Runs tasks; the result has `samples` of each. `arguments` are lm_eval's; a context has 256 tokens."""
    own = {"model": "midlogit", "max_length": 256, **arguments.pop("model_args")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the harness and its data loader
        return lm_eval.simple_evaluate(
            model=model,
            model_args=own,
            tasks=list(tasks),
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
            **{"batch_size": 1, **arguments},
        )


def score(pair: Pair, texts: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """log q of each text after its context, and whether all of its tokens are the most likely ones."""
    encode = pair.mixing.teacher.encode
    params = SamplingParams.preset("exploratory", temperature=0, top_logprobs=1)
    found = []
    wholes = [encode(context + text) for context, text in texts]
    for (context, _), ids, scores in zip(texts, wholes, pair.score(wholes, params), strict=True):
        count = len(ids) - len(encode(context))
        assert scores.top is not None
        most_likely = [top.q[0][0] for top in scores.top[-count:]]
        loglikelihood = sum(scores.diagnostics.logprobs[-count:])
        found.append((loglikelihood, ids[-count:] == most_likely))
    return found
