"""The tiny corpus: what is read, what is dropped, what is held out, how it is phrased as plain text.

Knows the corpus files and the text forms; nothing of tokens, models or training.

    python training/corpus.py          # prints what each filter keeps
"""

from __future__ import annotations

import collections
import hashlib
import json
import lzma
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus"

STORY_REQUESTS = (
    "Tell me a short story about {subject}.",
    "Write a short story about {subject} with the words {a}, {b} and {c}.",
    "Can you tell me a story with the words {a}, {b} and {c}?",
    "Please write a story about {subject}.",
)
STOP_WORDS = """what when where which while who why how does did will would could should have has been being
    the and are was were that this with from your you they them their there can for not"""
STOP = frozenset(STOP_WORDS.split())
COMMON = 10  # a word is common if at least so many answers hold it
NARRATOR = re.compile(r"\b(I|I'm|my|me|we|our|us)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Example:
    """One question or story request with its answer; `clean` marks what the teacher is tuned on."""

    kind: str
    request: str
    answer: str
    clean: bool

    @property
    def held_out(self) -> bool:
        """A fixed 2% of the examples, chosen by a hash of the request, never trained on."""
        digest = hashlib.sha256(self.request.lower().encode()).digest()
        return int.from_bytes(digest[:4], "big") % 50 == 0

    def plain(self) -> str:
        return f"Question: {self.request}\nAnswer: {self.answer}"

    def plain_forms(self) -> list[str]:
        """The documents this may be in the plain text: a question in its form, a story mostly bare."""
        return (
            [self.plain()] if self.kind == "question" else [self.answer, self.answer, self.plain()]
        )


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


def stems(text: str) -> set[str]:
    return {word[:5] for word in words_of(text) if len(word) > 2 and word not in STOP}


def rows_of(name: str) -> Iterator[dict]:
    with lzma.open(FOLDER / name, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def questions() -> Iterator[Example]:
    """Distinct questions with a whole-sentence answer; clean ones answer with the question's own words."""
    seen: set[str] = set()
    for row in rows_of("qa_0.jsonl.xz"):
        question, answer = row["question"].strip(), " ".join(row["answer"].split())
        length = len(answer.split())
        whole = question.endswith("?") and answer[-1:] in (".", "!") and 3 <= length <= 70
        if not whole or question.lower() in seen:
            continue
        seen.add(question.lower())
        clean = (
            4 <= length <= 50
            and bool(stems(question) & stems(answer))
            and not NARRATOR.search(answer)
            and not re.search(r'[0-9:*"]', question + answer)
        )
        yield Example("question", question, answer, clean)


def stories() -> Iterator[Example]:
    """Stories of 25 to 220 words; clean ones keep to the request, have no narrator and do not repeat."""
    for number, row in enumerate(rows_of("stories_0.jsonl.xz")):
        text = re.sub(r"\s*\n\s*", "\n", row["text"].strip())
        length = len(text.split())
        if not 25 <= length <= 220 or text[-1] not in '.!?"':
            continue
        a, b, c = row["words"]
        template = STORY_REQUESTS[number % len(STORY_REQUESTS)]
        article = "an" if row["subject"][0] in "aeiou" else "a"
        request = template.format(subject=f"{article} {row['subject']}", a=a, b=b, c=c)
        asked = [row["subject"]] * ("{subject}" in template) + [a, b, c] * ("{a}" in template)
        sentences = re.split(r"(?<=[.!?])\s+", text)
        clean = (
            40 <= length <= 140
            and all(word[:4] in text.lower() for word in asked)
            and len(set(sentences)) >= 0.95 * len(sentences)
            and len(set(text.split())) >= 0.5 * length
            and not NARRATOR.search(re.sub(r'"[^"]*"', "", text))
            and not re.search(r"[0-9:*#]", text)
        )
        yield Example("story", request, text, clean)


def load(seed: int = 0) -> tuple[list[Example], list[Example]]:
    """All examples as (training, held out), each shuffled with `seed`; clean ones hold common words only."""
    found = [*questions(), *stories()]
    counts = collections.Counter(
        word for example in found for word in set(words_of(example.answer))
    )
    common = {word for word, count in counts.items() if count >= COMMON}
    examples = [replace(e, clean=e.clean and common.issuperset(words_of(e.plain()))) for e in found]
    random.Random(seed).shuffle(examples)
    return [e for e in examples if not e.held_out], [e for e in examples if e.held_out]


def main() -> None:
    files = {"question": "qa_0.jsonl.xz", "story": "stories_0.jsonl.xz"}
    read = {kind: sum(1 for _ in rows_of(name)) for kind, name in files.items()}
    for part, examples in zip(("training", "held out"), load(), strict=True):
        for kind, total in read.items():
            kept = [e for e in examples if e.kind == kind]
            print(
                f"{part}: {kind}: {len(kept)} of {total} read, {sum(e.clean for e in kept)} of them clean"
            )


if __name__ == "__main__":
    main()
