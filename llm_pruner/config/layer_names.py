"""Where the decoder layers are among dotted names, and how a removal renumbers them.

Nothing here imports torch: pruning on disk uses it too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class LayerNames:
    """The names of modules and tensors that belong to decoder layers.

    Attributes:
        prefixes: what comes before a layer's index, such as ``model.layers.``; several where a
            layer is made of entries of several lists.
        num_layers: how many layers there are.
    """

    prefixes: tuple[str, ...]
    num_layers: int

    @cached_property
    def _layer(self) -> re.Pattern[str]:
        prefix = "|".join(map(re.escape, self.prefixes))
        return re.compile(rf"({prefix})(\d+)((?:\..*)?)", re.DOTALL)

    def split(self, name: str) -> tuple[str, int, str] | None:
        """What comes before the layer's index, the index, and the rest; None outside the layers."""
        match = self._layer.fullmatch(name)
        return (match[1], int(match[2]), match[3]) if match else None

    def index(self, name: str) -> int | None:
        """The layer that `name` belongs to; None outside the layers."""
        parts = self.split(name)
        return parts[1] if parts else None

    def rename(self, name: str, kept: Sequence[int]) -> str | None:
        """The name in a model that has only the layers `kept`; None for what is removed.

        Blocks past the last layer (for multi-token prediction) stay past the last layer.
        """
        parts = self.split(name)
        if parts is None:
            return name
        prefix, index, rest = parts
        if index >= self.num_layers:
            return f"{prefix}{len(kept) + index - self.num_layers}{rest}"
        return f"{prefix}{kept.index(index)}{rest}" if index in kept else None

    def original(self, name: str, kept: Sequence[int]) -> str:
        """The name in the full model of what the model with the layers `kept` calls `name`."""
        parts = self.split(name)
        if parts is None:
            return name
        prefix, index, rest = parts
        past = index - len(kept)
        return f"{prefix}{kept[index] if past < 0 else self.num_layers + past}{rest}"
