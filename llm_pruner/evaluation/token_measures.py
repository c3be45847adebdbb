"""Measures of single tokens: plain functions of logits, labels and the full model's logits."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy


def _nll(scores: torch.Tensor, label: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    return cross_entropy(scores, label, reduction="none")


def _kl(scores: torch.Tensor, label: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    wanted, found = full.log_softmax(-1), scores.log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1)


def _agreement(scores: torch.Tensor, label: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    return (scores.argmax(-1) == full.argmax(-1)).float()


TOKEN_READERS = {"nll": _nll, "kl": _kl, "agreement": _agreement}
