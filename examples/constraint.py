"""The same prompt with and without the teacher's nucleus as support: texts, KLs, entropies.

    python examples/constraint.py [BASE_URL TEACHER_URL]

Without URLs the bundled pair is used.
"""

import sys
from statistics import fmean

from midlogit import Pair, SamplingParams

PROMPT = "Tell me a short story about a dog."


def main() -> None:
    urls = sys.argv[1:3]
    with Pair.http(*urls) if urls else Pair.local() as pair:
        for constrained in (True, False):
            params = SamplingParams(
                max_tokens=40, seed=3, n=3, constraint_to_target=constrained, target_top_p=0.9
            )
            completions = pair.generate([PROMPT], params, chat=True)
            print("held to the teacher's top-p 0.9" if constrained else "whole vocabulary")
            print(f"  {completions[0].text.strip()!r}")
            for name in ("alpha", "kl_base", "kl_teacher", "entropy", "tv_bound"):
                values = [
                    v for completion in completions for v in getattr(completion.diagnostics, name)
                ]
                print(f"  mean {name:<11} {fmean(values):.3f}")


if __name__ == "__main__":
    main()
