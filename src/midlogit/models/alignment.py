"""Whether two vocabularies can be mixed: which ids mean the same token in both; knows vocabularies, no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from midlogit.errors import PairMismatch

MAX_DIFFERING_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Alignment:
    """Agreement of two vocabularies.

    Attributes:
        size: ids 0 … size − 1 are used; what either model pads beyond the smaller vocabulary is dropped.
        shared: number of ids that both define below `size`.
        differing: ids that both define with different tokens, masked when mixing, with (base, teacher) tokens.
        undefined: ids below `size` that not both define, masked too.
    """

    size: int
    shared: int
    differing: dict[int, tuple[str, str]]
    undefined: tuple[int, ...]

    @classmethod
    def taken_for_granted(cls, size: int) -> Alignment:
        """The alignment of vocabularies that cannot be listed; probes have shown that they agree."""
        return cls(size, size, {}, ())

    @property
    def masked_ids(self) -> tuple[int, ...]:
        return tuple(sorted({*self.differing, *self.undefined}))

    def describe_differences(self, most: int = 5) -> str:
        shown = [f"{i}: {b!r} / {t!r}" for i, (b, t) in sorted(self.differing.items())[:most]]
        return ", ".join(shown)


def align(
    base: Mapping[int, str], teacher: Mapping[int, str], base_size: int, teacher_size: int
) -> Alignment:
    """Compares two vocabularies id by id.

    Args:
        base, teacher: id to token.
        base_size, teacher_size: columns of each model's logits, which may be padded.
    """
    size = min(base_size, teacher_size)
    shared = [i for i in base if i < size and i in teacher]
    return Alignment(
        size=size,
        shared=len(shared),
        differing={i: (base[i], teacher[i]) for i in shared if base[i] != teacher[i]},
        undefined=tuple(i for i in range(size) if i not in base or i not in teacher),
    )


def require_mixable(alignment: Alignment) -> None:
    """Refuses vocabularies of which more than 1% of the shared ids differ.

    Raises:
        PairMismatch: naming how many differ and the first few.
    """
    differing, shared = len(alignment.differing), alignment.shared
    if not shared or differing > MAX_DIFFERING_SHARE * shared:
        raise PairMismatch(
            f"The tokenizers disagree: {differing} of {shared} shared ids differ ({alignment.describe_differences()}).",
            "Mixing needs two models with one tokenizer.",
        )
