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

    def index(self, name: str) -> int | None:
        """The layer that `name` belongs to; None outside the layers."""
        match = self._layer.fullmatch(name)
        return int(match[2]) if match else None

    def rename(self, name: str, kept: Sequence[int]) -> str | None:
        """The name in a model that has only the layers `kept`; None for what is removed.

        Anything past the last layer (heads for multi-token prediction) is removed too:
        transformers does not load it.
        """
        match = self._layer.fullmatch(name)
        if match is None:
            return name
        index = int(match[2])
        return f"{match[1]}{kept.index(index)}{match[3]}" if index in kept else None

    def original(self, name: str, kept: Sequence[int]) -> str:
        """The name in the full model of what the model with the layers `kept` calls `name`."""
        match = self._layer.fullmatch(name)
        return f"{match[1]}{kept[int(match[2])]}{match[3]}" if match else name
