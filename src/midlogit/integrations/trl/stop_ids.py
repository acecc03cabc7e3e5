"""The ending ids of student and teacher in losses that compare ids; knows output heads, trains nothing."""

from __future__ import annotations

from typing import Any

from midlogit.errors import InvalidRequest
from midlogit.models.checkpoint import Checkpoint
from midlogit.models.mixing import Mixing


def align_stop_ids(teacher: Any, mixing: Mixing) -> tuple[int, int] | None:
    """Has a teacher give its probability of ending to the student's ending id: two rows of its output head swap.

    Losses that compare ids, such as distillation's, otherwise teach a student whose ending id differs never to end.
    The head is untied from the embeddings. The teacher may not be one of a running pair.

    Args:
        teacher: the teacher's module, of the trainer's own. mixing: of the pair (`Pair.mixing`).

    Returns:
        (the student's ending id, the teacher's), or None where they are the same and nothing changes.
    """
    student_id, teacher_id = (_ending_id(side) for side in (mixing.base, mixing.teacher))
    if student_id == teacher_id:
        return None

    head = teacher.get_output_embeddings()
    untied = type(head)(head.in_features, head.out_features, bias=head.bias is not None)
    untied = untied.to(device=head.weight.device, dtype=head.weight.dtype)
    order = list(range(head.out_features))
    order[student_id], order[teacher_id] = teacher_id, student_id
    untied.weight.data = head.weight.data[order]
    if head.bias is not None:
        untied.bias.data = head.bias.data[order]

    teacher.config.tie_word_embeddings = False
    teacher.set_output_embeddings(untied.requires_grad_(head.weight.requires_grad))
    return student_id, teacher_id


def _ending_id(side: Any) -> int:
    """The id with which a model ends its answers: its tokenizer's, which chat models set to their end of turn."""
    if isinstance(side, Checkpoint) and side.tokenizer.eos_token_id is not None:
        return int(side.tokenizer.eos_token_id)
    if not side.stop_ids:
        raise InvalidRequest(f"{side.name} has no stop id.", "Set eos_token_id of its tokenizer.")
    return int(side.stop_ids[0])
