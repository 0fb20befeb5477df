"""Model organisms: networks small enough to train by the dozen and to take apart completely."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mechinterp.errors import TrainingError
from mechinterp.randomness import derive_seed
from mechinterp.tasks.base import Task
from mechinterp.tasks.written import WrittenTask
from mechinterp.training.config import ModelConfig

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def initial_model(config: ModelConfig, task: Task | WrittenTask, *, seed: int) -> LlamaForCausalLM:
    """A random `LlamaForCausalLM` over the task's own token ids, in float32 and eval mode.

    Arms that share `seed` share the initialisation. The global random state is left as it was.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    if isinstance(task, Task) and task.n_positions > config.n_positions:
        raise TrainingError(
            f"model: n_positions is {config.n_positions}, but prompts of task {task.name!r} have "
            f"{task.n_positions} tokens; raise n_positions"
        )
    llama = LlamaConfig(
        vocab_size=task.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_mlp,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        max_position_embeddings=config.n_positions,
        initializer_range=config.initializer_range,
        tie_word_embeddings=False,
        # A task's ids have no special tokens, whatever the defaults of the class say.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "initialisation"))
        model = AutoModelForCausalLM.from_config(
            llama, dtype=torch.float32, attn_implementation="eager"
        )
    return model.eval()
