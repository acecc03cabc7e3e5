"""The effect of forcing the first token to the teacher: α is 1 there, and the text opens as the teacher's.

    python examples/first_token.py [BASE_URL TEACHER_URL]

Without URLs the bundled pair is used.
"""

import sys
from collections import Counter

from midlogit import Pair, SamplingParams

PROMPT = "What is your name?"


def main() -> None:
    urls = sys.argv[1:3]
    with Pair.http(*urls) if urls else Pair.local() as pair:
        for forced in (True, False):
            params = SamplingParams(max_tokens=8, seed=1, n=16, force_first_token=forced)
            completions = pair.generate([PROMPT], params, chat=True)
            openings = Counter(
                completion.text.split()[0] for completion in completions if completion.text.split()
            )
            print(
                "forced" if forced else "free",
                f"first α {completions[0].diagnostics.alpha[0]:.2f}",
                dict(openings),
            )


if __name__ == "__main__":
    main()
