"""The base and the teacher each see the question in a template of their own.

    python examples/dual_prompts.py [BASE_URL TEACHER_URL]

Without URLs the bundled pair is used.
"""

import sys

from midlogit import Pair, SamplingParams

QUESTIONS = ["Why is the sky blue?", "What does a fox eat?"]
BASE_TEMPLATE = "Question: {}\nAnswer:"


def main() -> None:
    urls = sys.argv[1:3]
    with Pair.http(*urls) if urls else Pair.local() as pair:
        completions = pair.generate(
            base_prompts=[BASE_TEMPLATE.format(question) for question in QUESTIONS],
            teacher_prompts=[[{"role": "user", "content": question}] for question in QUESTIONS],
            params=SamplingParams(max_tokens=60, seed=1),
        )
    for question, completion in zip(QUESTIONS, completions, strict=True):
        alpha = completion.diagnostics.alpha
        print(f"{question}\n  {completion.text.strip()}\n  mean α {sum(alpha) / len(alpha):.2f}\n")


if __name__ == "__main__":
    main()
