"""A causal language model as the trainer needs it: hidden states at chosen positions, and log-probabilities of them.

The vocabulary projection is the largest product of a small model, and most positions do not need it. So the backbone
runs over whole rows, and only the requested positions meet the output weights, in chunks (``bridle.core.logprobs``).
That bypasses the model's own ``forward``, and families differ in what they do to their logits; so what we compute is
compared with the model's own logits when a model is wrapped, and where no known formula agrees, its own are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridle.core.divergence import exact_kl, exact_kl_from_hidden
from bridle.core.head import HeadAnswers, VocabularyHead, Weighing
from bridle.core.logprobs import entropy_from_logits, logprobs_from_logits
from bridle.errors import ModelError
from bridle.language.backbones import computes_compiled, hidden_at
from bridle.language.rooms import gradient_of
from bridle.language.vocabulary import head_answers, token_logprobs
from bridle.random import generator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CausalModel", "HeadForm", "States"]

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
_PROBE_LOGIT = 64.0


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """What a model holds at n requested positions."""

    hidden: Float[Tensor, "n D"]
    """[n, D] the backbone's last hidden states: what a value head reads."""
    features: Float[Tensor, "n F"]
    """[n, F] what :meth:`CausalModel.logprobs` reads: ``hidden``, or the logits [n, V] on the plain path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadForm:
    """How a family makes logits of hidden states: z = softcap·tanh(scale·(hWᵀ + b)/softcap), or scale·(hWᵀ + b)."""

    scale: float = 1.0
    """factor on the projection (Cohere, Granite, Falcon-H1, MiniCPM …)."""
    softcap: float | None = None
    """bound that tanh puts on the logits (Gemma 2 and later)."""

    def logits(
        self, hidden: Float[Tensor, "n D"], weight: Float[Tensor, "V D"], bias: Float[Tensor, " V"] | None
    ) -> Float[Tensor, "n V"]:
        """Return z in full, in float32 or wider."""
        return self.finish(torch.nn.functional.linear(hidden, weight, bias))

    def finish(self, raw: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        """Return z of ``raw`` = hWᵀ + b, in float32 or wider."""
        scaled = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if self.scale != 1.0:
            scaled = self.scale * scaled
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


class CausalModel(nn.Module):
    """Any Hugging Face causal language model, read at chosen positions.

    Rows are padded on the right and need no attention mask: no position sees what comes after it, and positions count
    from the left. Construction runs the model on a few random tokens and raises ModelError if it is not causal;
    ``warning`` says why the plain path is used, and is None on the fused one.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.form: HeadForm | None = None
        self.warning: str | None = None
        with _evaluating(model), torch.no_grad():
            self._require_causal()
            self._find_form()

    @property
    def fused(self) -> bool:
        """Whether log-probabilities come straight from hidden states, without [n, V] logits."""
        return self.form is not None

    def computes_compiled(self, dtype: torch.dtype) -> bool:
        """Whether whole texts, from tokens to log-probabilities, go through compiled code that computes in ``dtype``."""
        return self.fused and computes_compiled(self.model.base_model, dtype)

    @property
    def width(self) -> int:
        """D, the size of a hidden state."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.model.device)

    def forward(self, input_ids: Int[Tensor, "B L"], rows: Int[Tensor, " n"], columns: Int[Tensor, " n"]) -> States:
        """Same as :meth:`states`."""
        return self.states(input_ids, rows, columns)

    def states(
        self,
        input_ids: Int[Tensor, "B L"],
        rows: Int[Tensor, " n"],
        columns: Int[Tensor, " n"],
        *,
        positions: Int[Tensor, "B L"] | None = None,
    ) -> States:
        """Run the model over right-padded rows and keep the positions ``(rows[i], columns[i])``.

        The state at column l has seen tokens 0 … l, so it predicts token l + 1. Padding may be any id. ``positions`` says where
        in its text each token stands, if that is not its column.
        """
        if self.form is not None:
            hidden = hidden_at(self.model.base_model, input_ids, rows, columns, positions=positions)
            return States(hidden=hidden, features=hidden)
        where = {} if positions is None else {"position_ids": positions}
        output = self.model(input_ids=input_ids, use_cache=False, output_hidden_states=True, **where)
        return States(hidden=output.hidden_states[-1][rows, columns], features=output.logits[rows, columns])

    def logits(self, features: Float[Tensor, "n F"]) -> Float[Tensor, "n V"]:
        """Return the whole logits of some features: for samplers and oracles, not for training."""
        if self.form is None:
            return features
        weight, bias = self._head()
        return self.form.logits(features, weight, bias)

    def logprobs(
        self,
        features: Float[Tensor, "n F"],
        targets: Int[Tensor, " n"],
        *,
        temperature: float = 1.0,
        with_entropy: bool = True,
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Return log π(target) and the entropy of π = softmax(z/τ), both in nats; entropy is 0 where not asked for."""
        if self.form is None:
            logp = logprobs_from_logits(features, targets, temperature=temperature)
            if not with_entropy:
                return logp, torch.zeros_like(logp)
            return logp, entropy_from_logits(features, temperature=temperature)
        return token_logprobs(features, self.head(), targets, temperature=temperature, with_entropy=with_entropy)

    @torch.no_grad()
    def answers(
        self,
        features: Float[Tensor, "n F"],
        targets: Int[Tensor, " n"],
        *,
        reference: tuple[CausalModel, Float[Tensor, "n F"]] | None = None,
        temperature: float = 1.0,
        weighing: Weighing | None = None,
    ) -> tuple[HeadAnswers, Float[Tensor, "n F"] | None]:
        """Return log π(target), the entropy and the KL to a reference, each position's logits computed once.

        With ``weighing`` (fused models only) also ∂ loss / ∂ features, and the output weights' gradient is added to theirs:
        see :func:`bridle.language.vocabulary.head_answers`.
        """
        if self.form is None or (reference is not None and reference[0].form is None):
            if weighing is not None:
                raise ValueError("the gradient of a head in one pass needs a fused model")
            logp, entropy = self.logprobs(features, targets, temperature=temperature)
            if reference is None:
                return HeadAnswers(logp=logp, entropy=entropy, kl=None, ref_logp=None), None
            kl, (other, theirs) = self.exact_kl(features, *reference, temperature=temperature), reference
            ref_logp, _ = other.logprobs(theirs, targets, temperature=temperature, with_entropy=False)
            return HeadAnswers(logp=logp, entropy=entropy, kl=kl, ref_logp=ref_logp), None
        head = self.head()
        moved = [t for t in (head.weight, head.bias) if weighing is not None and t is not None and t.requires_grad]
        for tensor in moved:
            if gradient_of(tensor) is None and tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        return head_answers(
            features,
            head,
            targets,
            reference=None if reference is None else (reference[1], reference[0].head()),
            temperature=temperature,
            weighing=weighing,
            weight_grad=head.weight.grad if moved else None,
            bias_grad=head.bias.grad if moved and head.bias is not None else None,
        )

    def head(self) -> VocabularyHead:
        """Return the output weights and how they make logits; of a fused model only."""
        if self.form is None:
            raise ValueError("on the plain path the model's own forward makes the logits")
        weight, bias = self._head()
        return VocabularyHead(weight=weight, bias=bias, scale=self.form.scale, softcap=self.form.softcap)

    def exact_kl(
        self,
        features: Float[Tensor, "n F"],
        reference: CausalModel,
        ref_features: Float[Tensor, "n F"],
        *,
        temperature: float = 1.0,
    ) -> Float[Tensor, " n"]:
        """Return KL(π ‖ π_ref) over the whole vocabulary at each position, nats, with gradient to this model."""
        if self.form is None or self.form != reference.form:
            return exact_kl(self.logits(features) / temperature, reference.logits(ref_features) / temperature)
        weight, bias = self._head()
        ref_weight, ref_bias = reference._head()
        return exact_kl_from_hidden(
            features,
            weight,
            ref_features,
            ref_weight,
            bias=bias,
            ref_bias=ref_bias,
            temperature=temperature,
            scale=self.form.scale,
            softcap=self.form.softcap,
        )

    def _head(self) -> tuple[Tensor, Tensor | None]:
        head = self.model.get_output_embeddings()
        return head.weight, head.bias

    def _probe(self, length: int) -> Int[Tensor, "2 l"]:
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        ids = generator(0, "head-probe").integers(0, vocabulary, size=(2, 12))
        return torch.from_numpy(ids[:, :length]).to(self.device)

    def _require_causal(self) -> None:
        whole = self.model(input_ids=self._probe(12), use_cache=False).logits[:, :7].float()
        prefix = self.model(input_ids=self._probe(7), use_cache=False).logits.float()
        if not _agree(whole, prefix, self.model.dtype):
            raise ModelError(
                f"{type(self.model).__name__} is not causal: what it says at a position changes with later tokens; "
                "a causal (decoder-only) language model is needed"
            )

    def _find_form(self) -> None:
        """Choose the fused formula that agrees with the model's own logits."""
        head, backbone = self.model.get_output_embeddings(), self.model.base_model
        plain = f"log-probabilities of {type(self.model).__name__} come from its own [n, V] logits, slower and larger:"
        if not isinstance(head, nn.Linear) or backbone is self.model:
            self.warning = f"{plain} it has no plain output layer"
            return
        probe = self._probe(12)
        hidden = backbone(input_ids=probe, use_cache=False).last_hidden_state.flatten(0, 1)
        # Untrained logits are so small that tanh is the identity: they are blown up until a cap must show.
        largest = float(nn.functional.linear(hidden, head.weight, head.bias).abs().max())
        factor = _PROBE_LOGIT / max(largest, 1e-6)
        with _scaled_output(backbone, factor):
            own = self.model(input_ids=probe, use_cache=False).logits.flatten(0, 1).float()
        for form in _candidates(self.model.config.get_text_config()):
            if _agree(form.logits(hidden * factor, head.weight, head.bias).float(), own, self.model.dtype):
                self.form = form
                return
        self.warning = f"{plain} it changes them in a way that Bridle does not know"


def _candidates(config: Any) -> Iterator[HeadForm]:
    """Yield the forms that a configuration may mean; which one it means, the comparison decides."""
    scales = [1.0]
    for name, inverted in (
        ("logit_scale", False),
        ("logits_scaling", True),
        ("logits_scaling", False),
        ("lm_head_multiplier", False),
        ("output_multiplier", False),
    ):
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value > 0:
            scales.append(1.0 / value if inverted else float(value))
    cap = getattr(config, "final_logit_softcapping", None)
    for softcap in (None,) if cap is None else (float(cap), None):
        for scale in dict.fromkeys(scales):
            yield HeadForm(scale=scale, softcap=softcap)


def _agree(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Compare relative to the largest logit; False where either is not finite."""
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= _TOLERANCE[dtype] * theirs.abs().max())


@contextmanager
def _scaled_output(backbone: nn.Module, factor: float) -> Iterator[None]:
    def scale(module: nn.Module, arguments: tuple[object, ...], output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * factor
        return output

    handle = backbone.register_forward_hook(scale)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
