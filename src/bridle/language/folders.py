"""What a model folder must hold, looked at before anything is opened: descriptions that are JSON, weights that are whole.

Only headers are read, so it costs milliseconds whatever the model's size. What transformers would pass over in silence
(a broken generation_config.json, by which the tokens that end an answer are lost) or meet only after minutes is refused
here by the name of its file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from bridle.errors import ModelError

__all__ = ["check_folder", "tensor_shapes"]

_DESCRIPTIONS = ("config.json", "generation_config.json", "tokenizer_config.json")
_LENGTHS = ("vocab_size", "hidden_size", "n_embd")
_COUNTS = ("num_hidden_layers", "n_layer")
_SAME = "take weights and config.json from the same model"
_POINTER = b"version https://git-lfs"


def check_folder(folder: Path) -> None:
    """Refuse a local model folder that cannot be opened, as far as that can be told without opening it.

    Raises ModelError where a description is no JSON object, weights are pickled, missing, cut short or outside the
    folder, or where config.json asks for more than the weights can hold.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json: not a model folder in Hugging Face layout")
    found = [_object(folder / name) for name in _DESCRIPTIONS if (folder / name).is_file()]
    _check_skeleton(folder, found[0], [shape for path in _weights(folder) for shape in tensor_shapes(path).values()])


def _object(path: Path) -> Mapping[str, object]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}; take another copy") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is {type(value).__name__}, expected a JSON object; take another copy")
    return value


def _weights(folder: Path) -> list[Path]:
    """Return the files that the weights are read from."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise _no_weights(folder)
    names = _object(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index} lists no files of weights; take another copy")
    parts = sorted(set(names.values()))
    for name in parts:
        if Path(name).name != name:
            raise ModelError(f"{index} names {name!r}, which lies outside the folder; take another copy")
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name} is missing, which {index.name} names; take another copy")
    return [folder / name for name in parts]


def _no_weights(folder: Path) -> ModelError:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        return ModelError(
            f"{folder} holds only pickled weights ({pickled[0]}), which are never opened; convert them where you trust "
            "them: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) writes safetensors"
        )
    inside = [path for path in (folder / "policy", folder / "reward") if path.is_dir()]
    hint = f"; did you mean {inside[0]}?" if inside else ""
    return ModelError(f"{folder} holds no weights (no model.safetensors){hint}")


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor, from the file's header; the file's length must be what the header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        with path.open("rb") as file:
            pointer = file.read(len(_POINTER)) == _POINTER
        remedy = "it is a Git LFS pointer: run git lfs pull" if pointer else "take another copy"
        raise ModelError(f"{path} is not a whole safetensors file ({str(error)[:200]}); {remedy}") from error


def _check_skeleton(folder: Path, config: Mapping[str, object], shapes: list[tuple[int, ...]]) -> None:
    """Refuse sizes for which no weights are there: building such a skeleton may take minutes, or all memory."""
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    longest = max((side for shape in shapes for side in shape), default=0)
    for names, most, what in ((_LENGTHS, longest, "no tensor is that long"), (_COUNTS, len(shapes), "too few tensors")):
        for name in names:
            value = text.get(name)
            if not isinstance(value, int):
                continue  # transformers says what it must be
            if value < 1:
                raise ModelError(f"{folder / 'config.json'} says {name}={value}, expected a whole number >= 1; {_SAME}")
            if value > most:
                raise ModelError(f"{folder / 'config.json'} says {name}={value}, but {what} in its weights; {_SAME}")
