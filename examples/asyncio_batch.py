"""64 prompts in flight at once from asyncio code, with a progress bar.

    python examples/asyncio_batch.py [BASE_URL TEACHER_URL]

Without URLs the bundled pair is used.
"""

import asyncio
import sys

from tqdm.asyncio import tqdm

from midlogit import Completion, Pair, SamplingParams

ANIMALS = ["fox", "dog", "cat", "bird", "frog", "bear", "mouse", "rabbit"]
PLACES = ["forest", "house", "garden", "river", "school", "park", "farm", "town"]


async def write(pair: Pair, prompt: str, seed: int) -> Completion:
    params = SamplingParams(max_tokens=24, seed=seed)
    return (await pair.agenerate([prompt], params, chat=True))[0]


async def main() -> None:
    urls = sys.argv[1:3]
    pair = await asyncio.to_thread(lambda: Pair.http(*urls) if urls else Pair.local())
    try:
        prompts = [
            f"Tell me a story about a {animal} in a {place}."
            for animal in ANIMALS
            for place in PLACES
        ]
        completions = await tqdm.gather(
            *(write(pair, prompt, n) for n, prompt in enumerate(prompts))
        )
    finally:
        await asyncio.to_thread(pair.close)
    for prompt, completion in list(zip(prompts, completions, strict=True))[:3]:
        print(f"{prompt}\n  {completion.text.strip()}\n")
    print(
        f"{sum(len(c.token_ids) for c in completions)} tokens, {pair.statistics()['success_rate']:.0%} succeeded"
    )


if __name__ == "__main__":
    asyncio.run(main())
