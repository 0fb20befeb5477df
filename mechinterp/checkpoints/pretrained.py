"""What transformers knows about a checkpoint: its model class, and how stored tensors fit it.

The judge of names and shapes is transformers' own loader, run on the meta device with empty tensors
of the stored shapes: renamings, prefixes, merged experts and tied weights are resolved as they will
be when the model is loaded, and no weight is read.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechinterp.checkpoints.weights import StoredTensor
from mechinterp.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Fields of a config that change while the function stays: book-keeping, storage and outputs. Those
# that begin with an underscore do so too.
_VOLATILE = {
    "architectures",
    "auto_map",
    "dtype",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


@dataclass(frozen=True)
class Layout:
    """How stored names map to the model's.

    `names` has the model's name of every stored tensor that it uses; `tied` maps a name to the one
    it shares its weights with, where the config ties them.
    """

    names: dict[str, str]
    tied: dict[str, str]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' load reports and bars; what they report is raised as an error."""
    from transformers.utils import logging

    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()


def read_model_class(
    path: Path, values: Mapping[str, Any]
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The model class that `values`, the content of the config at `path`, asks for, and its config.

    Only classes that transformers ships are used. A config that also points to code of its own
    (`auto_map`) is read without it, with a warning; without a shipped class it is refused.
    """
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type, architectures = values.get("model_type"), values.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise CheckpointError(
            f'{path}: has no "architectures"; add them, for example "architectures": '
            '["LlamaForCausalLM"]'
        )
    shipped = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(model_type))
    if shipped not in architectures and "auto_map" in values:
        raise CheckpointError(
            f"{path}: {architectures[0]} brings its own code (auto_map), which is never run; "
            f"use one of an architecture that transformers {transformers.__version__} ships"
        )
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{path}: model_type {model_type!r} is unknown to transformers "
            f"{transformers.__version__}; correct it or install a version that knows it"
        )
    if shipped is None or shipped not in architectures:
        raise CheckpointError(
            f"{path}: {architectures[0]} is not the causal language model of model_type "
            f"{model_type!r} ({shipped or 'there is none'}); use a checkpoint with that head"
        )
    if "quantization_config" in values:
        raise CheckpointError(
            f"{path}: the weights are quantised (quantization_config); de-quantise them, for "
            "example with `model.dequantize()`, and save the result"
        )
    if "auto_map" in values:
        warnings.warn(
            f"{path}: auto_map (remote code) is ignored; {shipped} is built into transformers",
            stacklevel=2,
        )
    try:
        config = CONFIG_MAPPING[model_type].from_dict(dict(values))
    except Exception as error:  # transformers validates configs with many kinds of exception
        raise _does_not_describe(path, shipped, error) from error
    return getattr(transformers, shipped), config


def fit_tensors(
    directory: Path,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: Mapping[str, StoredTensor],
) -> Layout:
    """Check that the stored tensors are those of the model; say how their names map to its own."""
    import torch

    config_path = directory / "config.json"
    empty = {
        name: torch.empty(tensor.shape, device="meta", dtype=torch.float32)
        for name, tensor in tensors.items()
    }
    try:
        loaded: Any = model_class.from_pretrained(
            None,
            config=config,
            state_dict=empty,
            device_map={"": "meta"},
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        model, report = loaded
    except Exception as error:  # a config can fail anywhere in a model's constructor
        raise _does_not_describe(config_path, model_class.__name__, error) from error
    if report["mismatched_keys"]:
        name, stored, expected = min(report["mismatched_keys"])
        raise CheckpointError(
            f"{directory}: tensor {name!r} has shape {tuple(stored)} but config.json asks for "
            f"{tuple(expected)}{_others(report['mismatched_keys'])}; {_REMEDY}"
        )
    if report["error_msgs"]:
        raise CheckpointError(f"{directory}: {one_line(report['error_msgs'][0])}; save it again")
    described = f"the {model_class.__name__} that config.json describes"
    if missing := report["missing_keys"]:
        raise CheckpointError(
            f"{directory}: has no tensor {min(missing)!r}{_others(missing)}, which {described} "
            f"needs; {_REMEDY}"
        )
    if unexpected := report["unexpected_keys"]:
        raise CheckpointError(
            f"{directory}: has a tensor {min(unexpected)!r}{_others(unexpected)}, which "
            f"{described} does not know; {_REMEDY}"
        )
    ignored = model_class._keys_to_ignore_on_load_unexpected or ()
    ignored = re.compile("|".join([*ignored, r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]))
    expected_names = set(model.state_dict()) | set(model.all_tied_weights_keys)
    prefix = f"{model_class.base_model_prefix}."
    names = {}
    for name in tensors:
        if name in expected_names:
            names[name] = name
        elif prefix + name in expected_names:  # saved without the head, as GPT-2 once was
            names[name] = prefix + name
        elif not ignored.search(name):  # renamed on loading, so the stored name stays
            names[name] = name
    return Layout(names, dict(model.all_tied_weights_keys))


def essential_config(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config says beyond its class's defaults, without volatile fields.

    Leaving defaults out keeps a hash the same when a new version of transformers adds a field.
    """
    default = _without_volatile(type(config)().to_dict())
    values = _without_volatile(config.to_dict())
    said = {name: value for name, value in values.items() if default.get(name, ...) != value}
    return {**said, "model_type": config.model_type}


def read_sizes(config: PreTrainedConfig) -> dict[str, int]:
    """Layers, widths, heads and vocabulary, under transformers' standard names."""
    text_config = config.get_text_config()
    sizes = {name: getattr(text_config, name, None) for name in _SIZES}
    return {name: value for name, value in sizes.items() if isinstance(value, int)}


def one_line(error: object) -> str:
    """A message of any length as the end of one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _without_volatile(values: Any) -> Any:
    if isinstance(values, dict):
        return {
            str(name): _without_volatile(value)
            for name, value in values.items()
            if name not in _VOLATILE and not str(name).startswith("_")
        }
    if isinstance(values, (list, tuple)):
        return [_without_volatile(value) for value in values]
    return values


def _does_not_describe(path: Path, architecture: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: does not describe a {architecture} ({one_line(error)}); correct it, or restore "
        "the one saved with the weights"
    )


def _others(names: set[Any]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


_REMEDY = "use the config.json that was saved with these weights, or save the model again"
