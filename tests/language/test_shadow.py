"""One bfloat16 shadow of the layers' weights, read by trainer and sampler alike."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bridle.language.adapter_files import linear_layers
from bridle.language.adapters import LoraSettings
from bridle.language.causal import CausalModel
from bridle.language.memory import estimate_memory
from bridle.language.models import ModelSettings, load_causal_lm, save_model
from bridle.language.policy import Critic, LanguagePolicy
from bridle.language.roles import CriticSettings, Roles, open_roles
from bridle.language.sampler import SamplingSettings, products
from bridle.language.sampler.products import projection
from bridle.language.segments import Segments
from bridle.language.shadow import masters_of
from bridle.learn.optim import Optimiser, OptimSettings
from bridle.learn.step import Seen, Slopes
from bridle.random import generator, uniforms
from tests.language.tiny import byte_tokenizer, tiny_model

IDS = torch.from_numpy(generator(0, "shadow-ids").integers(3, 90, size=(2, 9)))
PROMPTS, ANSWERS = [IDS[0, :4], IDS[1, :3]], [IDS[0, 4:], IDS[1, 3:]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(folder, tiny_model(vocab_size=260), byte_tokenizer())
    return str(folder)


def roles_of(path: str, *, lora: LoraSettings | None = None, source: str = "actor", **changes: Any) -> Roles:
    return open_roles(
        ModelSettings(path=path),
        CriticSettings(source=source),  # type: ignore[arg-type]
        None,
        temperature=1.0,
        device=torch.device("cpu"),
        compute_dtype=changes.pop("dtype", torch.bfloat16),
        lora=lora,
        **changes,
    )


def slopes(seen: Seen, rows: slice) -> Slopes:
    n = len(seen.logp)
    ramp = torch.linspace(-1.0, 1.0, n)
    return Slopes(logp=ramp, entropy=0.1 * ramp, value=ramp.flip(0))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_policy_on_shadows_learns_as_one_under_autocast_to_the_bit(family: str, tmp_path: Path) -> None:
    """Autocast on float32 weights, which rounds them in every pass, is the oracle, for actor, critic and reference."""
    save_model(tmp_path / "m", tiny_model(family, vocab_size=260), byte_tokenizer())
    roles = roles_of(str(tmp_path / "m"))
    network, _ = load_causal_lm(ModelSettings(path=str(tmp_path / "m")))
    actor = CausalModel(network)
    critic = Critic(copy.deepcopy(network.base_model), nn.Linear(32, 1))
    assert isinstance(roles.policy.critic, Critic)
    critic.head.load_state_dict(roles.policy.critic.head.state_dict())
    plain = LanguagePolicy(actor, critic, temperature=1.0, reference=None, compute_dtype=torch.bfloat16).eval()
    units = Segments.of(PROMPTS, ANSWERS)
    groups = roles.groups(OptimSettings(lr=1e-3), OptimSettings(lr=1e-3))
    ours = Optimiser(groups, total_steps=1, masters=roles.masters)
    theirs = [torch.optim.AdamW(p.parameters(), lr=1e-3, weight_decay=0.0, fused=True) for p in (actor, critic)]
    for _ in range(2):
        seen = [policy.differentiate(units, slopes) for policy in (plain, roles.policy)]
        assert torch.equal(seen[0].logp, seen[1].logp)
        assert torch.equal(seen[0].value, seen[1].value)
        assert torch.equal(seen[0].entropy, seen[1].entropy)
        for p in (actor, critic):
            norm = torch.nn.utils.get_total_norm([q.grad for q in p.parameters() if q.grad is not None])
            for q in p.parameters():
                if q.grad is not None and norm > 1.0:
                    q.grad.mul_(1.0 / (float(norm) + 1e-6))
        for other in theirs:
            other.step()
            other.zero_grad()
        ours.step()
        with roles.masters.in_place():
            for name, p in plain.named_parameters():
                assert torch.equal(roles.policy.get_parameter(name), p), name


def test_layers_are_held_in_two_bytes_and_what_is_read_in_float32_in_four(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no compiled code rounds them as it goes."""
    monkeypatch.setattr("bridle.language.layers.halved", None)
    roles = roles_of(base)
    plain, _ = load_causal_lm(ModelSettings(path=base))
    layers = sum(layer.weight.numel() for layer in linear_layers(plain).values())  # type: ignore[union-attr, operator, misc]
    whole = sum(p.numel() for p in plain.parameters())

    def held(module: nn.Module) -> int:
        return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}.values())

    assert held(roles.policy.actor) == 2 * layers + 4 * (whole - layers)
    assert held(roles.reference) == held(roles.policy.actor)
    kinds = {name: p.dtype for name, p in roles.policy.actor.model.named_parameters()}
    assert kinds["model.layers.0.mlp.up_proj.weight"] is torch.bfloat16
    assert {kinds[n] for n in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight")} == {torch.float32}
    estimate = estimate_memory(
        roles.policy, (roles.reference,), answers=2, minibatches=1, longest=9, answer_tokens=5, rows=2,
        micro_batch_tokens=None, keeps_features=False,
    )  # fmt: skip
    trained = sum(p.numel() for p in roles.policy.parameters())
    mastered = sum(p.numel() for p in roles.policy.parameters() if p.dtype is torch.bfloat16)
    assert mastered == 2 * layers
    assert estimate.gradients == 4 * trained
    assert estimate.optimiser == 8 * trained + 4 * mastered


def test_a_tied_table_keeps_float32(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    masters_of([model.base_model], torch.bfloat16)
    assert model.lm_head.weight.dtype is torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].mlp.up_proj.weight.dtype is torch.bfloat16


def test_float32_runs_have_no_masters(base: str) -> None:
    roles = roles_of(base, dtype=torch.float32)
    assert all(p.dtype is torch.float32 and roles.masters.of(p) is p for p in roles.policy.parameters())


@pytest.mark.parametrize("sampler", ["engine", "reference"])
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["whole", "adapters"])
def test_the_sampler_follows_the_shadow(
    base: str, sampler: str, lora: LoraSettings | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a step the sampler's log-probs are those of the new weights, up to bfloat16's rounding; a tape is no exception."""
    monkeypatch.setattr("bridle.language.sampler.tape.PAYS_FROM", 1)
    roles = roles_of(base, sampler=sampler, lora=lora)
    groups = roles.groups(OptimSettings(lr=0.05), OptimSettings(lr=0.05))
    optimiser = Optimiser(groups, total_steps=1, masters=roles.masters)

    def gap() -> tuple[float, Tensor]:
        drawn = roles.sampler(PROMPTS, uniforms(0, "shadow", 1, range(2), 12), SamplingSettings(max_new_tokens=12))
        with torch.no_grad():
            logp = roles.policy(Segments.of(PROMPTS, [d.ids for d in drawn])).logp
        return float((logp - torch.cat([d.logp for d in drawn])).abs().mean()), logp

    first, before = gap()
    for _ in range(3):
        roles.policy.differentiate(Segments.of(PROMPTS, ANSWERS), slopes)
        optimiser.step()
    second, after = gap()
    assert before.shape != after.shape or float((before - after).abs().mean()) > 0.1
    assert first < 0.03
    assert second < 0.03


def test_adapters_stay_in_float32_on_a_base_of_two_bytes(base: str) -> None:
    roles = roles_of(base, lora=LoraSettings(rank=2))
    kinds = {"lora" if "lora_" in name else name.rpartition(".")[0].rpartition(".")[2]: p.dtype
             for name, p in roles.policy.named_parameters()}  # fmt: skip
    assert kinds["lora"] is torch.float32
    assert kinds["base_layer"] is torch.bfloat16
    assert kinds["head"] is torch.float32
    storages = {p.untyped_storage().data_ptr() for p in roles.reference.parameters()}
    own = {p.untyped_storage().data_ptr() for p in roles.policy.actor.parameters() if not p.requires_grad}
    assert storages == own
    assert all(roles.masters.of(p) is p for p in roles.policy.parameters())


def test_a_vocabulary_that_autocast_would_round_every_step_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "bfloat16_is_slow", lambda device: False)
    actor = CausalModel(tiny_model("gemma2"))
    hidden = torch.from_numpy(generator(0, "hidden").standard_normal((5, 32), dtype="float32"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = projection(actor, 10)
        assert logits is not actor.logits
        assert torch.equal(logits(hidden), actor.logits(hidden))
    with torch.no_grad():
        assert torch.equal(projection(actor, 10)(hidden), actor.logits(hidden))
