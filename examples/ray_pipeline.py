"""Prompts from Parquet, completions on a pool of Ray actors, results to Parquet.

    python examples/ray_pipeline.py PROMPTS.parquet FOLDER [BASE TEACHER]

The input has the columns `id` and `prompt`. Without models the bundled pair is used.
"""

import sys

import ray

from midlogit import SamplingParams
from midlogit.jobs import PairSource
from midlogit.ray import Generate, actor_pool

ROWS_PER_BLOCK = 64  # what one call of an actor takes, and what is sampled again when an actor dies


def main() -> None:
    source, target, *models = sys.argv[1:]
    ray.init()
    gpus = int(ray.cluster_resources().get("GPU", 0))

    sampled = (
        ray.data.read_parquet(source)
        .repartition(target_num_rows_per_block=ROWS_PER_BLOCK)
        .map_batches(
            Generate,
            fn_constructor_kwargs={
                "source": PairSource("local", *models),
                "params": SamplingParams(max_tokens=24, n=2, seed=7),
                "id_column": "id",
                "chat": True,
            },
            batch_size=ROWS_PER_BLOCK,
            batch_format="pyarrow",
            num_gpus=min(gpus, 1),
            num_cpus=0,  # the pool must not wait for the processors that read and write
            **actor_pool(1, max(gpus, 1)),
        )
    )
    sampled.write_parquet(target)

    written = ray.data.read_parquet(target)
    errors = sum(row["error"] is not None for row in written.select_columns(["error"]).iter_rows())
    print(
        f"{written.count()} completions in {target}, {errors} errors, mean α {written.mean('mean_alpha'):.3f}"
    )


if __name__ == "__main__":
    main()
