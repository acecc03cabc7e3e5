"""A folder that `datasets` and the Hub read as it is: Parquet files with real lists of messages, and a card."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import orjson

from midlogit.jobs.exports.columns import table_of
from midlogit.jobs.exports.prompts import prompt_array, survey
from midlogit.jobs.exports.results import Choices, Results, Tally, without_errors

if TYPE_CHECKING:
    import pyarrow as pa

DROPPED = ("prompt_form", "base_prompt_form", "error")  # said by the types, or left out
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
tags:
- midlogit
- synthetic
---
# Completions sampled with midlogit

One row per completion. Each token was drawn from q* ∝ base^(1−α) · teacher^α.

```python
datasets.load_dataset("THIS FOLDER OR REPOSITORY")
```

| column | |
|---|---|
| `row_id`, `sample`, `seed` | which row of the input, which of its completions, and the seed it was drawn with |
| `prompt`, `base_prompt` | the teacher's prompt, and the base's where it had one of its own |
| `text`, `token_ids`, `finish_reason`, `stop_reason` | the completion; its ids include the one that ended it |
| `logprobs` | log q of each id, under the distribution that it was drawn from |
| `base_logprobs`, `teacher_logprobs` | log-probability under one model alone, at temperature 1 |
| `base_tempered_logprobs`, `teacher_tempered_logprobs` | the same at the sampling temperature, of each id |
| `base_support_logmass`, `teacher_support_logmass` | log of the mass of what could be drawn, under each model |
| `alpha`, `kl_base`, `kl_teacher`, `entropy`, `ess_base`, `ess_teacher` | the mixture at each token |

The job:

```json
{facts}
```
"""


def tables(results: Results, tally: Tally, choices: Choices) -> Iterator[pa.Table]:
    """One table per part, prompts as lists of structs where they are messages."""
    shapes = survey(results)
    sides = {"prompt": shapes.prompt, "base_prompt": shapes.base}

    for table in without_errors(results.read(results.schema.names), tally):
        kept = {name: table[name] for name in table.column_names if name not in DROPPED}
        for side, shape in sides.items():
            if shape is None:
                del kept[side]
            else:
                kept[side] = prompt_array(table, shape, side)
        yield table_of(kept)


def card(results: Results) -> str:
    """The README.md of the folder."""
    facts = orjson.dumps(results.facts, option=orjson.OPT_INDENT_2).decode()
    return CARD.replace("{facts}", facts)
