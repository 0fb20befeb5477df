"""The optimiser's state as safetensors beside a checkpoint: what a run needs to go on exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from mechinterp.errors import TrainingError

DIRECTORY = "training_state"


def state_files(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> dict[str, bytes]:
    """Files to store inside the checkpoint of `step`, named by their path in it.

    Where only some parameters are trained, adapters, these are among them.
    """
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tensors = {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    files = {
        f"{DIRECTORY}/optimizer.safetensors": save(tensors),
        f"{DIRECTORY}/state.json": json.dumps({"step": step}).encode(),
    }
    if len(trained) < len(list(model.parameters())):
        files[f"{DIRECTORY}/trained.safetensors"] = save(trained)
    return files


def restore_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path
) -> None:
    """Give `optimizer` the state stored in `checkpoint`; the inverse of `state_files`."""
    path = checkpoint / DIRECTORY / "optimizer.safetensors"
    parameters = dict(model.named_parameters())
    try:
        tensors = load(path.read_bytes())
        for key, tensor in tensors.items():
            name, _, entry = key.rpartition("/")
            optimizer.state[parameters[name]][entry] = tensor
    except (OSError, KeyError, SafetensorError) as error:
        raise TrainingError(
            f"{path}: not the optimiser state of this model ({error}); delete the run directory "
            "and train again"
        ) from error


def restore_trained(model: torch.nn.Module, checkpoint: Path) -> None:
    """Give the trained parameters of `model` the values stored in `checkpoint`."""
    path = checkpoint / DIRECTORY / "trained.safetensors"
    parameters = dict(model.named_parameters())
    try:
        for name, tensor in load(path.read_bytes()).items():
            parameters[name].data.copy_(tensor)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise TrainingError(
            f"{path}: not the adapters of this model ({error}); delete the run directory and train "
            "again"
        ) from error


def has_state(checkpoint: Path) -> bool:
    return (checkpoint / DIRECTORY / "state.json").is_file()


def drop_state(checkpoint: Path) -> None:
    """Delete the optimiser state of a checkpoint that a newer one has made useless."""
    shutil.rmtree(checkpoint / DIRECTORY, ignore_errors=True)
