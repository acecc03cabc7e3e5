"""Names and shapes of the tensors that a model takes; knows no tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from midlogit.errors import WeightMismatch

if TYPE_CHECKING:
    from torch.nn import Module

STAYS = "The old weights stay."
NAMED = 5  # names that a message holds

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors that a model takes.

    Attributes:
        shapes: by name, those that may be left out among them.
        optional: names that may be left out: tied weights beside the one that is kept, and buffers.
    """

    shapes: Mapping[str, Shape]
    optional: frozenset[str]

    @classmethod
    def of(cls, module: Module) -> Layout:
        """The layout of a module, by the names of its state."""
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        own = {name for name, _ in module.named_parameters()}  # of tied ones the first
        return cls(shapes, frozenset(shapes.keys() - own))

    def require_known(self, name: str, shape: Shape) -> None:
        """Checks one tensor.

        Raises:
            WeightMismatch: an unknown name or another shape.
        """
        if name not in self.shapes:
            raise WeightMismatch(
                f"The base has no weight {name!r}.",
                f"Its names are like {next(iter(self.shapes))!r}. {STAYS}",
            )
        if shape != self.shapes[name]:
            raise WeightMismatch(
                f"{name} has the shape {list(shape)}, in the base {list(self.shapes[name])}.", STAYS
            )

    def require_complete(self, names: Iterable[str]) -> None:
        """Checks that no tensor is missing.

        Raises:
            WeightMismatch: names some of those that are.
        """
        missing = sorted(self.shapes.keys() - self.optional - set(names))
        if missing:
            more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
            raise WeightMismatch(
                f"Weights are missing: {', '.join(missing[:NAMED])}{more}.",
                f"Give all of them. {STAYS}",
            )
