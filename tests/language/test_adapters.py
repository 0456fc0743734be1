"""Low-rank adapters: what they add, whose weights they share, and what a folder of them must hold.

W + (α/r) B A: Hu et al. 2021, §4.1.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from bridle.errors import ConfigError, ModelError
from bridle.language.adapter_files import CONFIG, WEIGHTS, linear_layers, read_adapter
from bridle.language.adapters import Adapted, LoraSettings, open_adapted, twin
from bridle.language.causal import CausalModel
from bridle.language.models import ModelSettings, load_causal_lm, load_reward_model, save_model
from bridle.language.policy import Critic, LanguagePolicy
from bridle.language.quickening import plainly
from bridle.language.roles import CriticSettings, Roles, open_roles
from bridle.language.sampler import SamplingSettings
from bridle.language.scorers import RewardModelScorer, RewardSettings, build_scorer
from bridle.language.segments import Segments
from bridle.learn.optim import Optimiser, OptimSettings
from bridle.learn.step import Seen, Slopes, plain_vjp
from bridle.random import generator, uniforms
from tests.language.tiny import byte_tokenizer, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft's own
IDS = torch.from_numpy(generator(0, "adapter-ids").integers(3, 90, size=(2, 9)))


def a_base(folder: Path, family: str = "llama", **changes: Any) -> str:
    save_model(folder, tiny_model(family, vocab_size=260, **changes), byte_tokenizer())
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return a_base(tmp_path_factory.mktemp("base") / "model")


def adapted(path: str, *, rank: int = 3, alpha: float = 6.0, moved: bool = True, **changes: Any) -> Adapted:
    """An adapter on the model at ``path``; ``moved``: with B drawn instead of 0."""
    found = open_adapted(ModelSettings(path=path), LoraSettings(rank=rank, alpha=alpha, **changes), seed=0)
    if moved:
        move(found.model)
    return found


@torch.no_grad()
def move(model: nn.Module, seed: int = 1) -> None:
    """Give every B numbers of size 0.1."""
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.copy_(torch.from_numpy(0.1 * generator(seed, name).standard_normal(tuple(p.shape))))


def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


def storages(*modules: nn.Module) -> dict[int, int]:
    """Bytes of every piece of memory that parameters lie in, each once."""
    held = [p.untyped_storage() for module in modules for p in module.parameters()]
    return {s.data_ptr(): s.nbytes() for s in held}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_with_b_at_zero_the_actor_is_the_base_to_the_bit(family: str, tmp_path: Path) -> None:
    found = adapted(a_base(tmp_path / "base", family), moved=False)
    plain = plainly(load_causal_lm(ModelSettings(path=str(tmp_path / "base")))[0])
    assert torch.equal(logits(found.model), logits(plain))
    move(found.model)
    assert not torch.equal(logits(found.model), logits(plain))
    assert torch.equal(logits(found.base.model), logits(plain)), "the base has moved"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_adapters_gradient_is_the_chain_rule_from_the_full_weights_gradient(family: str, tmp_path: Path) -> None:
    """W = W₀ + s B A, so with G = dL/dW at that W: dL/dB = s G Aᵀ and dL/dA = s Bᵀ G. G is a full fine-tuning's."""
    found = adapted(a_base(tmp_path / "base", family))
    found.save(tmp_path / "adapter")
    whole, _ = load_causal_lm(ModelSettings(path=str(tmp_path / "adapter")))
    for model in (whole, found.model):
        out = model(input_ids=IDS, use_cache=False).logits.float().log_softmax(-1)
        (-out[:, :-1].gather(2, IDS[:, 1:, None]).mean()).backward()
    full = linear_layers(whole)
    scale, seen = 6.0 / 3, 0
    own = dict(found.model.named_parameters())
    for name, pair in read_adapter(tmp_path / "adapter").layers.items():
        grad = full[name].weight.grad
        grad = grad if isinstance(full[name], nn.Linear) else grad.T  # type: ignore[union-attr, operator]
        for side, expected in (("A", scale * pair.b.T @ grad), ("B", scale * grad @ pair.a.T)):
            torch.testing.assert_close(own[f"{name}.lora_{side}.default.weight"].grad, expected, rtol=1e-4, atol=1e-6)
            seen += 1
    assert seen == 2 * len(full)
    assert all(p.grad is None for name, p in own.items() if "lora" not in name), "the base has a gradient"


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_merged_and_unmerged_say_the_same_and_so_does_peft(family: str, tmp_path: Path) -> None:
    path = a_base(tmp_path / "base", family)
    found = adapted(path)
    found.save(tmp_path / "adapter")
    found.save_merged(tmp_path / "merged")
    whole, _ = load_causal_lm(ModelSettings(path=str(tmp_path / "adapter")))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), str(tmp_path / "adapter")).eval()
    out = logits(found.model)
    for other in (whole, theirs, AutoModelForCausalLM.from_pretrained(tmp_path / "merged")):
        torch.testing.assert_close(logits(other), out, rtol=1e-4, atol=1e-4)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(dict(merged.named_parameters()), dict(whole.named_parameters()), rtol=1e-5, atol=1e-6)
    assert not (tmp_path / "adapter" / "config.json").exists()


def test_what_peft_has_trained_and_saved_is_read_as_it_computes(base: str, tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    move(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = load_causal_lm(ModelSettings(path=str(tmp_path / "theirs"), tokenizer=base))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    settings = ModelSettings(path=str(tmp_path / "theirs"))  # without a tokenizer of its own: the base's
    going_on = open_adapted(settings, LoraSettings(rank=2), seed=7)
    assert not going_on.fresh
    assert going_on.alpha == 5
    torch.testing.assert_close(logits(going_on.model), logits(theirs), rtol=1e-5, atol=1e-5)


def test_a_saved_adapter_comes_back_to_the_bit_and_only_into_a_model_like_its_own(base: str, tmp_path: Path) -> None:
    found = adapted(base)
    found.save(tmp_path / "adapter")
    again = adapted(base, moved=False)
    again.restore(tmp_path / "adapter")
    assert torch.equal(logits(again.model), logits(found.model))
    with pytest.raises(ModelError, match="other layers, or at another rank"):
        adapted(base, rank=4).restore(tmp_path / "adapter")


# One base


def roles_of(path: str, source: str = "actor", **changes: Any) -> Roles:
    return open_roles(
        ModelSettings(path=path),
        CriticSettings(source=source, reward_model=changes.pop("reward", None)),  # type: ignore[arg-type]
        None,
        temperature=1.0,
        device=torch.device("cpu"),
        compute_dtype=changes.pop("dtype", torch.float32),
        lora=LoraSettings(rank=3, alpha=6.0) if changes.pop("lora", True) else None,
        **changes,
    )


def a_reward_adapter(base: str, folder: Path) -> str:
    found = open_adapted(ModelSettings(path=base), LoraSettings(rank=2), seed=3, reward=True)
    move(found.model, seed=5)
    with torch.no_grad():
        found.model.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    found.save(folder)
    return str(folder)


def test_actor_reference_critic_and_judge_hold_the_base_once(base: str, tmp_path: Path) -> None:
    reward = a_reward_adapter(base, tmp_path / "reward")
    roles = roles_of(base, "reward", reward=reward)
    scorer = build_scorer(RewardSettings(model=reward), roles.tokenizer, base=roles.base)
    (judge,) = scorer.scorers
    assert isinstance(judge, RewardModelScorer)
    assert isinstance(roles.policy.critic, Critic)
    models = [roles.policy.actor, roles.policy.critic, roles.reference, judge.model]
    plain, _ = load_causal_lm(ModelSettings(path=base))
    layers, width = linear_layers(plain), 32
    sides = sum(sum(layer.weight.shape) for layer in layers.values())  # type: ignore[union-attr, arg-type, misc]
    small = 4 * (3 * sides + 2 * 2 * sides + (width + 1) + width)  # actor r = 3, critic and judge r = 2, V, score
    assert sum(storages(*models).values()) == sum(storages(plain).values()) + small
    learn = [name for name, p in roles.policy.named_parameters() if p.requires_grad]
    assert all("lora_" in name or name in ("critic.head.weight", "critic.head.bias") for name in learn)
    assert not any(p.requires_grad for p in (*roles.reference.parameters(), *judge.model.parameters()))


@pytest.mark.parametrize("source", ["actor", "trunk"])
def test_a_step_moves_adapters_and_heads_and_leaves_base_and_reference(base: str, source: str) -> None:
    roles = roles_of(base, source)
    before = {n: p.detach().clone() for n, p in roles.policy.named_parameters()}
    reference = logits(roles.reference.model)
    out = roles.policy(Segments.of([IDS[0, :4]], [IDS[0, 4:]]))
    groups = roles.groups(OptimSettings(lr=0.1), OptimSettings(lr=0.1))
    (out.logp.sum() + out.value.sum()).backward()
    optimiser = Optimiser(groups, total_steps=1)
    optimiser.step()
    after = dict(roles.policy.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    small = ("lora_", "critic.head.", "critic/head.") if source == "actor" else ("lora_", "critic.", "critic/")
    assert any("lora_B" in name for name in moved)
    assert all(any(part in name for part in small) for name in (*moved, *optimiser.state()))
    assert torch.equal(logits(roles.reference.model), reference)


def test_an_adapter_that_learns_on_has_itself_as_its_reference(base: str, tmp_path: Path) -> None:
    start = adapted(base)
    start.save(tmp_path / "sft")
    roles = roles_of(str(tmp_path / "sft"))
    assert torch.equal(logits(roles.reference.model), logits(start.model))
    assert torch.equal(logits(roles.policy.actor.model), logits(start.model))
    move(roles.policy.actor.model, seed=9)
    assert torch.equal(logits(roles.reference.model), logits(start.model))
    assert not torch.equal(logits(roles.policy.actor.model), logits(start.model))


@pytest.mark.parametrize("sampler", ["engine", "reference"])
def test_the_sampler_says_what_the_trainer_says_of_an_adapted_actor(base: str, sampler: str) -> None:
    roles = roles_of(base, sampler=sampler)
    move(roles.policy.actor.model)
    prompts = [IDS[0, :4], IDS[1, :6], IDS[0, :4]]
    drawn = roles.sampler(prompts, uniforms(0, "adapter", 1, range(3), 12), SamplingSettings(max_new_tokens=12))
    with torch.no_grad():
        logp = roles.policy(Segments.of(prompts, [d.ids for d in drawn])).logp
    gap = (logp - torch.cat([d.logp for d in drawn])).abs()
    assert float(gap.mean()) < 1e-5
    assert float(gap.max()) < 1e-4


def test_the_engines_tape_plays_adapters_as_they_are_now(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridle.language.sampler.tape.PAYS_FROM", 1)
    roles = roles_of(base, sampler="engine")
    settings = SamplingSettings(max_new_tokens=8)
    for seed in (1, 2):
        move(roles.policy.actor.model, seed=seed)
        (drawn,) = roles.sampler([IDS[0, :4]], uniforms(0, "tape", seed, range(1), 8), settings)
        with torch.no_grad():
            logp = roles.policy(Segments.of([IDS[0, :4]], [drawn.ids])).logp
        torch.testing.assert_close(drawn.logp, logp, rtol=0, atol=1e-4)


# Reward models


def test_a_reward_adapter_scores_alike_merged_shared_and_in_peft(base: str, tmp_path: Path) -> None:
    path = a_reward_adapter(base, tmp_path / "reward")
    whole, tokenizer = load_reward_model(ModelSettings(path=path))
    on_policy = roles_of(base)
    (judge,) = build_scorer(RewardSettings(model=path), tokenizer, base=on_policy.base).scorers
    assert isinstance(judge, RewardModelScorer)
    bare = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    theirs = PeftModel.from_pretrained(bare, path).eval()
    theirs.config.pad_token_id = 0
    out = logits(whole)
    assert float(out.abs().max()) > 0.1
    torch.testing.assert_close(logits(judge.model), out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(theirs), out, rtol=1e-4, atol=1e-4)


def test_a_judge_on_another_base_is_held_besides(base: str, tmp_path: Path) -> None:
    other = a_base(tmp_path / "other", seed=4)
    path = a_reward_adapter(other, tmp_path / "reward")
    whole, tokenizer = load_reward_model(ModelSettings(path=path))
    (judge,) = build_scorer(RewardSettings(model=path), tokenizer, base=roles_of(base).base).scorers
    assert isinstance(judge, RewardModelScorer)
    assert torch.equal(logits(judge.model), logits(whole))


def test_adapters_of_the_wrong_kind_are_refused(base: str, tmp_path: Path) -> None:
    reward = a_reward_adapter(base, tmp_path / "reward")
    adapted(base).save(tmp_path / "policy")
    with pytest.raises(ModelError, match="adapter of a reward model"):
        load_causal_lm(ModelSettings(path=reward))
    with pytest.raises(ModelError, match="adapter of a reward model"):
        adapted(reward, rank=2)
    with pytest.raises(ModelError, match="not a reward model, its head is missing"):
        build_scorer(RewardSettings(model=str(tmp_path / "policy")), byte_tokenizer(), base=roles_of(base).base)
    with pytest.raises(ModelError, match="not a reward model, its head is missing"):
        build_scorer(RewardSettings(model=str(tmp_path / "policy")), byte_tokenizer())


# What is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, "lora.rank=0: expected a whole number >= 1"),
        ({"rank": 2, "alpha": 0.0}, "lora.alpha=0.0"),
        ({"rank": 2, "alpha": float("nan")}, "lora.alpha=nan"),
        ({"alpha": 8.0}, "lora.alpha=8.0: expected a rank beside it"),
        ({"targets": ("q_proj",)}, "lora.targets=.*a rank beside it"),
        ({"merged": True}, "lora.merged=True: expected a rank beside it"),
        ({"rank": 2, "targets": ("",)}, "lora.targets="),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LoraSettings(**settings)


def test_layers_and_ranks_that_a_model_lacks_are_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="'q_prj': expected a linear layer of the model: down_proj, gate_proj, k_proj"
    ):
        adapted(base, targets=("q_proj", "q_prj"))
    with pytest.raises(ConfigError, match=r"lora.rank=17: expected at most 16, the smaller side of .*k_proj"):
        adapted(base, rank=17)
    with pytest.raises(ModelError, match="an adapter cannot hold one"):
        open_adapted(ModelSettings(path=base, pad_token="<new>", eos_token="<end>"), LoraSettings(rank=2), seed=0)
    adapted(base).save(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"lora.rank=4: expected 3, the rank of the adapter"):
        adapted(str(tmp_path / "a"), rank=4)
    with pytest.raises(ConfigError, match=r"lora.alpha=7.0: expected 6"):
        adapted(str(tmp_path / "a"), alpha=7.0)
    with pytest.raises(ConfigError, match=r"lora.targets=\('q_proj',\): expected the layers"):
        adapted(str(tmp_path / "a"), targets=("q_proj",))


def test_only_the_layers_asked_for_are_adapted(base: str) -> None:
    model = adapted(base, targets=("q_proj", "mlp.down_proj")).model
    ends = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_" in name}
    assert ends == {"q_proj", "down_proj"}


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("another method", {"peft_type": "LOHA"}, 'peft_type="LOHA", expected "LORA"'),
    ("another formula", {"use_dora": True}, "use_dora=true, expected off"),
    ("an unknown switch", {"use_new": [1]}, "use_new="),
    ("biases too", {"bias": "all"}, 'bias="all", expected "none"'),
    ("weights it was made from", {"init_lora_weights": "pissa"}, "init_lora_weights"),
    ("ranks of layers", {"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ("whole modules", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ("no rank", {"r": None}, "r=null, expected a whole number"),
    ("a rank beyond all layers", {"r": 10**400}, "r=1000.*expected a whole number from 1 to 65536"),
    ("a rank of another file", {"r": 2}, "expected \\[2, in\\]"),
    ("α of no size", {"lora_alpha": 0}, "lora_alpha=0"),
    ("α beyond floats", {"lora_alpha": 10**400}, "lora_alpha=1000"),
    ("no base", {"base_model_name_or_path": None}, "names no base"),
    ("a base that is not there", {"base_model_name_or_path": "/no/such/folder"}, "no such folder.*names that base"),
]


@pytest.mark.parametrize(("what", "changes", "said"), BAD, ids=[row[0] for row in BAD])
def test_an_adapters_description_is_checked(
    what: str, changes: dict[str, Any], said: str, base: str, tmp_path: Path
) -> None:
    adapted(base).save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text()) | changes
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said) as refused:
        load_causal_lm(ModelSettings(path=str(tmp_path / "a")))
    assert "\n" not in str(refused.value)


def test_an_adapters_files_are_checked(base: str, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    adapted(base).save(folder)
    settings, tensors = ModelSettings(path=str(folder)), load_file(folder / WEIGHTS)
    first = min(tensors)

    def refused(said: str) -> None:
        with pytest.raises(ModelError, match=said) as error:
            load_causal_lm(settings)
        assert "\n" not in str(error.value)

    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, folder / WEIGHTS)
    refused("'base_model.model.lm_head.weight', which is no part of a plain LoRA adapter")
    save_file(tensors | {first: tensors[first] * float("nan")}, folder / WEIGHTS)
    refused("numbers that are not finite")
    save_file({name: t for name, t in tensors.items() if name != first}, folder / WEIGHTS)
    refused("A missing and B")
    save_file({n.replace("layers.0", "layers.7"): t for n, t in tensors.items()}, folder / WEIGHTS)
    refused("has no such linear layer")
    save_file({n: t[:, :5].contiguous() if "lora_A" in n else t for n, t in tensors.items()}, folder / WEIGHTS)
    refused("an adapter needs the base that it was trained on")
    (folder / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused("git lfs pull")
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80")
    refused(r"only pickled weights \(adapter_model.bin\), which are never opened")
    (folder / CONFIG).write_text("{")
    refused("is not JSON")
    (folder / "config.json").write_text("{}")
    refused("holds both config.json and adapter_config.json")


def test_a_base_that_is_an_adapter_is_refused(base: str, tmp_path: Path) -> None:
    adapted(base).save(tmp_path / "a")
    adapted(base).save(tmp_path / "b")
    config = json.loads((tmp_path / "b" / CONFIG).read_text()) | {"base_model_name_or_path": str(tmp_path / "a")}
    (tmp_path / "b" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is an adapter too; merge that one first"):
        load_causal_lm(ModelSettings(path=str(tmp_path / "b")))


def test_a_twin_shares_what_is_frozen_and_owns_what_learns() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    other = twin(layer)
    assert other.weight is layer.weight
    assert other.bias is not layer.bias
    assert torch.equal(other.bias, layer.bias)


def test_a_policy_of_adapters_differentiates_as_autograd_does(base: str) -> None:
    """The hand-made pass of the training step, with the head's weights frozen, against plain autograd."""
    roles = roles_of(base)
    move(roles.policy)
    units = Segments.of([IDS[0, :4], IDS[1, :3]], [IDS[0, 4:], IDS[1, 3:]])
    draws = generator(0, "adapter-slopes").standard_normal((3, int(units.sizes.sum())), dtype="float32")
    a, b, c = torch.from_numpy(draws)

    def slopes(seen: Seen, rows: slice) -> Slopes:
        return Slopes(logp=a[rows], entropy=b[rows], value=c[rows], exact_kl=None)

    def gradients(policy: LanguagePolicy) -> dict[str, Tensor]:
        return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}

    roles.policy.differentiate(units, slopes)
    by_hand = gradients(roles.policy)
    roles.policy.zero_grad()
    seen, pull_back = plain_vjp(roles.policy, units)
    pull_back(slopes(seen, slice(None)))
    plain = gradients(roles.policy)
    assert by_hand.keys() == plain.keys()
    assert all("lora_" in name or "head" in name for name in plain)
    torch.testing.assert_close(by_hand, plain, rtol=1e-4, atol=1e-6)


def test_layers_run_again_on_the_way_back_give_the_same_gradients(base: str) -> None:
    units = Segments.of([IDS[0, :4]], [IDS[0, 4:]])
    found = []
    for recompute in (False, True):
        roles = roles_of(base, recompute=recompute)
        move(roles.policy)
        ramp = torch.linspace(-1.0, 1.0, 5)
        roles.policy.differentiate(units, lambda seen, rows: Slopes(logp=ramp[rows], value=ramp[rows]))  # noqa: B023
        found.append({n: p.grad for n, p in roles.policy.named_parameters() if p.grad is not None})
    assert any("lora_A" in name for name in found[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_a_frozen_base_needs_no_second_formula(base: str) -> None:
    found = adapted(base)
    assert CausalModel(found.model).form == CausalModel(copy.deepcopy(found.base.model)).form
