from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    MambaConfig,
)

from bridle.errors import ConfigError, ModelError
from bridle.language.models import (
    ModelSettings,
    check_reward_padding,
    context_length,
    disable_dropout,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
    save_model,
    stop_ids,
    tokenizer_notes,
)
from bridle.random import torch_rng

from .tiny import CHATML, byte_tokenizer, tiny_config, tiny_model

BYTES = 260


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model with its tokenizer, as anybody may have it."""
    path = tmp_path_factory.mktemp("model")
    save_model(path, tiny_model("llama", vocab_size=BYTES), byte_tokenizer())
    return path


def settings(path: Path, **changes: object) -> ModelSettings:
    return ModelSettings(path=str(path), **changes)  # type: ignore[arg-type]


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gpt2", True), ("gemma2", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_policy_opens_elsewhere_with_the_same_outputs(
    tmp_path: Path, family: str, tied: bool, dtype: torch.dtype
) -> None:
    random = tiny_model(family, vocab_size=BYTES, tie_word_embeddings=tied)
    save_model(tmp_path / "base", random, byte_tokenizer(chat_template=CHATML))
    model, tokenizer = load_causal_lm(settings(tmp_path / "base"), dtype=dtype)
    save_model(tmp_path / "policy", model, tokenizer, temperature=0.7)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    model.set_attn_implementation(again.config._attn_implementation)  # narrow heads attend with other rounding
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert (again(ids).logits - random(ids).logits).abs().max() < (1e-5 if dtype == torch.float32 else 0.5)
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template == CHATML
    config = json.loads((tmp_path / "policy/config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    generation = json.loads((tmp_path / "policy/generation_config.json").read_text())
    for saved in (config, generation):
        assert (saved["bos_token_id"], saved["eos_token_id"], saved["pad_token_id"]) == (1, 2, 0)
    assert (generation["do_sample"], generation["temperature"], generation["top_k"]) == (True, 0.7, 0)


def test_a_saved_policy_opens_in_a_fresh_process_without_bridle(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=BYTES)
    save_model(tmp_path / "policy", model, byte_tokenizer(chat_template=CHATML))
    script = (
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"  # as here: another number of threads rounds otherwise
        "from safetensors.torch import save_file\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer('A bridle holds a horse.', return_tensors='pt').input_ids\n"
        "with torch.no_grad():\n"
        "    save_file({'logits': model(ids).logits}, sys.argv[2])\n"
        "assert 'bridle' not in sys.modules and tokenizer.chat_template\n"
    )
    out = tmp_path / "logits.safetensors"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "policy"), str(out)], check=True, capture_output=True)
    ids = byte_tokenizer()("A bridle holds a horse.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(load_file(out)["logits"], model(ids).logits)


def test_more_than_one_stop_token_survives(tmp_path: Path, folder: Path) -> None:
    model, tokenizer = load_causal_lm(settings(folder))
    model.generation_config.eos_token_id = [2, 7]
    assert stop_ids(model, tokenizer) == (2, 7)
    save_model(tmp_path, model, tokenizer)
    again, tokenizer = load_causal_lm(settings(tmp_path))
    assert stop_ids(again, tokenizer) == (2, 7)
    renamed, tokenizer = load_causal_lm(settings(folder, eos_token="<|im_end|>"))
    assert stop_ids(renamed, tokenizer) == (tokenizer.convert_tokens_to_ids("<|im_end|>"), 2)


def test_no_stop_token_at_all(folder: Path) -> None:
    model, tokenizer = load_causal_lm(settings(folder))
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(ModelError, match=r"--model\.eos-token") as error:
        stop_ids(model, tokenizer)
    one_line(error)


def test_a_reward_head_depends_on_the_seed_alone(folder: Path) -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first, _ = load_reward_model(settings(folder), seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    second, _ = load_reward_model(settings(folder), seed=5)
    other, _ = load_reward_model(settings(folder), seed=6)
    assert torch.equal(first.score.weight, second.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert first.score.weight.std() > 0
    causal, _ = load_causal_lm(settings(folder))
    assert torch.equal(first.model.embed_tokens.weight, causal.model.embed_tokens.weight)


def test_a_saved_reward_model_opens_with_the_same_scores(tmp_path: Path, folder: Path) -> None:
    model, tokenizer = load_reward_model(settings(folder), seed=5)
    save_model(tmp_path, model, tokenizer)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    reopened, _ = load_reward_model(settings(tmp_path), seed=99)
    ids = torch.tensor([[1, 9, 30, 2], [1, 12, 2, 0]])
    assert again.config.num_labels == 1
    with torch.no_grad():
        assert torch.equal(reopened(ids).logits, model(ids).logits)
        model.set_attn_implementation(again.config._attn_implementation)  # narrow heads attend with other rounding
        assert torch.equal(again(ids).logits, model(ids).logits)
        short = again(ids[1:, :3]).logits
    torch.testing.assert_close(short, model(ids).logits[1:].detach())


def test_pad_equal_to_eos_is_refused_for_reward_models_only(folder: Path) -> None:
    tokenizer = byte_tokenizer(pad_token="</s>")
    with pytest.raises(ModelError, match=r"pad = eos = '</s>'.*--model.pad-token '<\|pad\|>'") as error:
        check_reward_padding(tokenizer)
    one_line(error)
    assert any("pad = eos" in note for note in tokenizer_notes(tokenizer))
    with pytest.raises(ModelError, match="pad = eos"):
        load_reward_model(settings(folder, pad_token="</s>"))
    policy, _ = load_causal_lm(settings(folder, pad_token="</s>"))
    assert policy is not None
    tokenizer.pad_token = None
    with pytest.raises(ModelError, match="has none; add one"):
        check_reward_padding(tokenizer)


def test_an_unknown_pad_token_grows_the_model_and_survives_saving(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(pad_token="</s>")
    size = len(tokenizer)
    model = tiny_model("gpt2", vocab_size=size)
    save_model(tmp_path / "base", model, tokenizer)
    reward, tokenizer = load_reward_model(settings(tmp_path / "base", pad_token="<|pad|>"))
    assert tokenizer.pad_token_id == size
    assert reward.config.pad_token_id == size
    assert reward.get_input_embeddings().weight.shape[0] == size + 1
    save_model(tmp_path / "reward", reward, tokenizer)
    again, _ = load_reward_model(settings(tmp_path / "reward"))
    ids = torch.tensor([[1, 9, 30, 2, size, size]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, reward(ids).logits)
        torch.testing.assert_close(reward(ids).logits, reward(ids[:, :4]).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_token_takes_no_probability_from_the_others(tmp_path: Path, tied: bool) -> None:
    tokenizer = byte_tokenizer()
    size = len(tokenizer)
    save_model(tmp_path, tiny_model("phi", vocab_size=size, tie_word_embeddings=tied), tokenizer)
    before, _ = load_causal_lm(settings(tmp_path))
    after, _ = load_causal_lm(settings(tmp_path, pad_token="<|new|>"))
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        old, new = before(ids).logits[0], after(ids).logits[0]
    torch.testing.assert_close(new[:, :size], old)
    torch.testing.assert_close(new[:, size], old.mean(-1), atol=1e-5, rtol=1e-4)
    assert (new.softmax(-1)[:, size] <= 1 / size).all()  # Jensen: exp(mean z) ≤ mean exp(z)
    assert after.config.vocab_size == size + 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "gpt_neox"])
def test_without_dropout_training_and_evaluation_agree(family: str) -> None:
    rates = {
        "llama": {"attention_dropout": 0.5},
        "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
        "phi": {"attention_dropout": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
        "gpt_neox": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
    }[family]
    model = tiny_model(family, **rates)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad(), torch_rng(0, "test"):
        still = model.eval()(ids).logits
        assert not torch.equal(model.train()(ids).logits, still)
        disable_dropout(model)
        assert torch.equal(model.train()(ids).logits, still)


def test_folders_that_cannot_serve(tmp_path: Path, folder: Path) -> None:
    def refused(path: Path | str, match: str, **changes: object) -> None:
        with pytest.raises(ModelError, match=match) as error:
            load_causal_lm(ModelSettings(path=str(path), **changes))  # type: ignore[arg-type]
        one_line(error)

    def copy(name: str, *without: str) -> Path:
        shutil.copytree(folder, tmp_path / name)
        for file in without:
            (tmp_path / name / file).unlink()
        return tmp_path / name

    refused(tmp_path / "nowhere", "no such folder")
    refused(folder / "config.json", "is a file; give the folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no config.json")
    refused(copy("no-tokenizer", "tokenizer.json"), "holds no tokenizer .*--model.tokenizer")
    refused(copy("no-weights", "model.safetensors"), "holds no weights")
    pickled = copy("pickled", "model.safetensors")
    (pickled / "pytorch_model.bin").write_bytes(b"never opened")
    refused(pickled, r"only pickled weights \(pytorch_model.bin\).*save_pretrained")
    torn = copy("torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    refused(torn, "torn/model.safetensors is not a whole safetensors file .*; take another copy")
    (torn / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n")
    refused(torn, "is a Git LFS pointer: run git lfs pull")
    (torn / "model.safetensors").unlink()
    index = torn / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../model/model.safetensors"}}')
    refused(torn, "names '../model/model.safetensors', which lies outside the folder")
    index.write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    refused(torn, "torn/model-1.safetensors is missing, which model.safetensors.index.json names")
    index.write_text('{"weight_map": []}')
    refused(torn, "index.json lists no files of weights")
    garbled = copy("garbled")
    (garbled / "config.json").write_text("{")
    refused(garbled, "garbled/config.json is not JSON: ")
    (garbled / "config.json").write_text("[" * 100_000)
    refused(garbled, "garbled/config.json is not JSON: maximum recursion")
    (garbled / "config.json").write_text("[]")
    refused(garbled, "garbled/config.json is list, expected a JSON object")
    lost = copy("lost")
    (lost / "generation_config.json").write_text("{")
    refused(lost, "lost/generation_config.json is not JSON")
    (lost / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ModelError, match="says eos_token_id='</s>'; expected an id or a list of ids"):
        stop_ids(*load_causal_lm(settings(lost)))
    refused("x" * 300, "x{80} cannot be reached: File name too long")
    unknown = copy("unknown")
    (unknown / "config.json").write_text('{"model_type": "no-such-family"}')
    refused(unknown, "cannot be opened")
    code = copy("code")
    config = json.loads((code / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (code / "config.json").write_text(json.dumps(config))
    (code / "own.py").write_text("raise SystemExit('ran')")
    refused(code, "cannot be opened")
    no_template = tmp_path / "none.jinja"
    refused(folder, "chat template .* cannot be read", chat_template=no_template)


def test_weights_that_do_not_fit(tmp_path: Path, folder: Path) -> None:
    for name, edit, match in (
        ("lacks", lambda w: {k: v for k, v in w.items() if "layers.1.mlp" not in k}, "lacks weights .*layers.1.mlp"),
        ("surplus", lambda w: {**w, "score.weight": torch.zeros(1, 32)}, "no place for: score.weight.*reward model"),
        ("shape", lambda w: {**w, "lm_head.weight": torch.zeros(BYTES, 31)}, "cannot be opened"),
    ):
        path = tmp_path / name
        shutil.copytree(folder, path)
        weights = edit(load_file(path / "model.safetensors"))
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=match) as error:
            load_causal_lm(settings(path))
        one_line(error)
    with pytest.raises(ModelError, match=r"does not fit LlamaForSequenceClassification: it lacks model\.layers"):
        load_reward_model(settings(tmp_path / "lacks"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_hidden_layers": 10**6}, "says num_hidden_layers=1000000, but too few tensors in its weights"),
        ({"hidden_size": 10**9}, "says hidden_size=1000000000, but no tensor is that long in its weights"),
        ({"vocab_size": 0}, "says vocab_size=0, expected a whole number >= 1"),
        ({"dtype": "float3"}, "cannot be opened: .*float3"),
        ({"model_type": ["llama"]}, "cannot be opened: "),
    ],
)
def test_a_skeleton_that_the_weights_cannot_fill_is_not_built(
    tmp_path: Path, folder: Path, changes: dict[str, object], match: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=match) as error:
        load_causal_lm(settings(copy))
    one_line(error)


def test_weights_that_are_not_numbers_are_named(tmp_path: Path, folder: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"copy: model.norm.weight holds numbers that are not finite"):
        load_causal_lm(settings(copy))


def test_a_hub_that_is_out_of_reach_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(self: object, name: str, **_: object) -> None:
        asked.append(name)
        raise ConnectionError("no route. And more")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(ModelError, match="hub gives no model for it: no route; check the name and the connection"):
        load_causal_lm(ModelSettings(path="nobody/nothing"))
    with pytest.raises(ModelError, match="nobody/words is no folder here, and the hub gives no model"):
        load_tokenizer(ModelSettings(path="nobody/nothing", tokenizer="nobody/words"))
    assert asked == ["nobody/nothing", "nobody/words"]


def test_a_classifier_of_several_labels_is_no_reward_model(tmp_path: Path) -> None:
    config = tiny_config("llama", vocab_size=BYTES, num_labels=3)
    with torch_rng(0, "test"):
        model = AutoModelForSequenceClassification.from_config(config)
    save_model(tmp_path, model, byte_tokenizer())
    with pytest.raises(ModelError, match="3 outputs; a reward model has one"):
        load_reward_model(settings(tmp_path))


def test_a_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_model("llama", vocab_size=96), byte_tokenizer())
    with pytest.raises(ModelError, match=r"ids up to \d+ but the model embeds only 96.*--model.tokenizer") as error:
        load_causal_lm(settings(tmp_path))
    one_line(error)


def test_settings_refuse_empty_names() -> None:
    with pytest.raises(ConfigError, match="pad_token=''"):
        ModelSettings(path="x", pad_token="")


def test_the_context_is_read_under_any_of_its_names() -> None:
    assert context_length(tiny_config("llama")) == 64
    assert context_length(tiny_config("gpt2")) == 64
    assert context_length(MambaConfig()) is None


def test_a_chat_template_from_a_file(tmp_path: Path, folder: Path) -> None:
    file = tmp_path / "chatml.jinja"
    file.write_text(CHATML)
    assert load_tokenizer(settings(folder)).chat_template is None
    assert load_tokenizer(settings(folder, chat_template=file)).chat_template == CHATML


def test_stories_bos_is_eos(shared_data: Path) -> None:
    model, tokenizer = load_causal_lm(settings(shared_data / "models/stories260K"))
    assert tokenizer_notes(tokenizer) == (
        "bos = eos = '<s>' (id 1): the first one opens the prompt, a later one ends the answer",
    )
    assert stop_ids(model, tokenizer) == (1,)
    check_reward_padding(tokenizer)
    assert context_length(model.config) == 512


def test_loading_prints_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_reward_model(settings(folder))
    load_causal_lm(settings(folder))
    assert capfd.readouterr() == ("", "")
