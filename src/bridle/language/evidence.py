"""What a text step was taken on, as tensors for a file and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from bridle.errors import NonFiniteStep
from bridle.language.comparisons import Comparison
from bridle.language.data import Encoded
from bridle.language.segments import Segments
from bridle.learn.step import Evidence

__all__ = [
    "comparisons_from",
    "comparisons_to",
    "demonstrations_from",
    "demonstrations_to",
    "segments_from",
    "segments_to",
    "unsampled",
]


def segments_to(segments: Segments) -> dict[str, Tensor]:
    """Lay token segments end to end."""
    tensors = _joined(segments.ids) | {"prompt_lengths": segments.prompt_lengths}
    if segments.ref_features is not None:
        tensors["ref_features"] = torch.cat(segments.ref_features)
    return tensors


def segments_from(tensors: Mapping[str, Tensor]) -> Segments:
    """Read what :func:`segments_to` laid out."""
    lengths, prompts = tensors["lengths"], tensors["prompt_lengths"]
    features = tensors.get("ref_features")
    sizes = (lengths - prompts).tolist()
    return Segments(
        ids=_apart(tensors),
        prompt_lengths=prompts,
        lengths=lengths,
        ref_features=None if features is None else torch.split(features, sizes),
    )


def demonstrations_to(items: Sequence[Encoded]) -> dict[str, Tensor]:
    """Lay demonstrations end to end."""
    return _joined([item.ids for item in items]) | {"learnt": torch.cat([item.learnt for item in items])}


def demonstrations_from(tensors: Mapping[str, Tensor]) -> list[Encoded]:
    """Read what :func:`demonstrations_to` laid out."""
    learnt = torch.split(tensors["learnt"], tensors["lengths"].tolist())
    pairs = zip(_apart(tensors), learnt, strict=True)
    return [
        Encoded(ids=ids, learnt=own, opening=None, place=f"row {row}") for row, (ids, own) in enumerate(pairs, start=1)
    ]


def comparisons_to(items: Sequence[Comparison]) -> dict[str, Tensor]:
    """Lay comparisons end to end."""
    return _joined([answer for item in items for answer in item.answers]) | {
        "answers": torch.tensor([len(item.answers) for item in items]),
        "characters": torch.tensor([length for item in items for length in item.lengths]),
        "margin": torch.tensor([item.margin for item in items], dtype=torch.float64),
    }


def comparisons_from(tensors: Mapping[str, Tensor]) -> list[Comparison]:
    """Read what :func:`comparisons_to` laid out."""
    answers, characters, found, at = _apart(tensors), tensors["characters"].tolist(), [], 0
    for count, margin in zip(tensors["answers"].tolist(), tensors["margin"].tolist(), strict=True):
        own = slice(at, at + count)
        found.append(Comparison(answers=answers[own], lengths=tuple(characters[own]), margin=margin))
        at += count
    return found


def _joined(ids: Sequence[Int[Tensor, " L"]]) -> dict[str, Tensor]:
    return {"ids": torch.cat(list(ids)), "lengths": torch.tensor([len(own) for own in ids], dtype=torch.int64)}


def _apart(tensors: Mapping[str, Tensor]) -> tuple[Int[Tensor, " L"], ...]:
    return torch.split(tensors["ids"], tensors["lengths"].tolist())


def unsampled(prompts: Sequence[Int[Tensor, " P"]]) -> NonFiniteStep:
    """Return the fault of prompts that could not be answered; in its evidence token 0 stands for each answer."""
    fault = NonFiniteStep("the policy's log-probability while sampling", tuple(range(len(prompts))))
    units = Segments.of(prompts, [torch.tensor([0])] * len(prompts))
    fault.evidence = Evidence(units=units, minibatch=None, objective=None)
    return fault
