"""A step of training by reward, sampling and update, against TRL's `GRPOTrainer`.

Both train copies of one network with GRPO's advantages, without a KL, one update per sampling, and
completions of one length: the end token is never sampled. Rewards are cheap and random, so that
next to no group is without a gradient. The default is an organism, 3 layers and d = 96, with 24
prompts of 12 tokens and 8 samples of 9 tokens each; `--smollm2` has 8 prompts of 12 digits.

TRL has its defaults, but for gradient checkpointing, which saves memory at the cost of time and is
off (`--checkpointing`: on). Steps take turns: one of ours runs within each call of TRL's reward
function, its time taken out of TRL's. CPU seconds of one thread: medians over steps, and of the
ratios of neighbours.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import add_model_options, seconds, smollm2  # limits threads first

# isort: split
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from mechinterp.checkpoints import save_checkpoint
from mechinterp.tasks.written import Marks, Problems, WrittenTask
from mechinterp.training.config import ModelConfig, TrainingConfig
from mechinterp.training.organism import initial_model
from mechinterp.training.problem_batches import ProblemSource
from mechinterp.training.rewarded import RewardedConfig, RewardedRun

N_PROMPT_TOKENS, N_SAMPLES, N_TOKENS = 12, 8, 9
N_WARM = 2  # steps that are not counted


@dataclass(frozen=True)
class Parity(WrittenTask):
    """Random prompts; right is a text whose token ids have an even sum."""

    vocab_size: int
    first: int = 2  # prompts have the tokens from `first` to `last`
    last: int = 39

    name = "parity"
    pad_token = 0
    max_new_tokens = N_TOKENS

    @property
    def end_token(self) -> int:  # type: ignore[override]
        """No token, so that nothing ends early."""
        return self.vocab_size

    def problems(self, n: int, *, seed: int = 0, **_: Any) -> Problems:
        generator = torch.Generator().manual_seed(seed)
        shape = (n, N_PROMPT_TOKENS)
        tokens = torch.randint(self.first, self.last + 1, shape, generator=generator)
        mask, every = torch.ones_like(tokens).bool(), torch.ones(n).bool()
        return Problems(
            tokens, mask, tokens, mask, every.long(), ~every, every, entries=(None,) * n
        )

    def mark(self, problems: Problems, completions: torch.Tensor, mask: torch.Tensor) -> Marks:
        nothing = torch.full(completions.shape[:2], float("nan"))
        return Marks(
            correct=completions.sum(-1) % 2 == 0,
            answer=completions[..., 0],
            confidence=nothing,
            confidence_tokens=torch.zeros_like(mask),
            steps_missing=nothing,
            steps_wrong=nothing,
        )


def organism_tokenizer(n_tokens: int) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(n_tokens)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")


def compare(
    run: RewardedRun, tokenizer: Any, out: Path, *, n_steps: int, checkpointing: bool
) -> tuple[list[float], list[float]]:
    """Seconds of our steps and of TRL's, in the order in which they were taken."""
    os.environ["CI"] = "1"  # or TRL sends telemetry
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model = run.start.load_model() if run.start else None
    assert model is not None
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ours: list[float] = []
    theirs: list[float] = []
    left = [0.0]

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        begun = seconds(model.device)
        theirs.append(begun - left[0])
        run.update(model, optimizer, len(ours))
        left[0] = seconds(model.device)
        ours.append(left[0] - begun)
        return [float(sum(ids) % 2 == 0) for ids in completion_ids]

    n_prompts = run.config.batch_size
    texts = tokenizer.batch_decode(run.task.problems(n_prompts * (n_steps + N_WARM)).tokens)
    arguments = GRPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=n_prompts * N_SAMPLES,
        num_generations=N_SAMPLES,
        max_completion_length=N_TOKENS,
        generation_kwargs={"min_new_tokens": N_TOKENS},
        gradient_checkpointing=checkpointing,
        learning_rate=run.config.learning_rate,
        max_steps=n_steps + N_WARM,
        logging_steps=10_000,
        save_strategy="no",
        report_to=[],
        use_cpu=model.device.type == "cpu",
        bf16=False,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=copy.deepcopy(model),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
        processing_class=tokenizer,
    )
    trainer.train()
    return ours[N_WARM:], theirs[N_WARM:]


def make_run(task: Parity, start: Any, n_prompts: int, out: Path) -> RewardedRun:
    optimizer = TrainingConfig(batch_size=n_prompts, learning_rate=1e-6, weight_decay=0.0)
    return RewardedRun(
        task=task,
        config=optimizer,
        out=out,
        start=start,
        source=ProblemSource(),
        rewarded=RewardedConfig(optimizer=optimizer, n_samples=N_SAMPLES, kl_every=0),
        reward=None,
        reward_seconds=10.0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smollm2", action="store_true")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--checkpointing", action="store_true", help="TRL's default")
    add_model_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        if options.smollm2:
            with smollm2(options.smollm2_dir, "cpu") as hooked:
                assert hooked.checkpoint is not None
                tokenizer = hooked.checkpoint.load_tokenizer()
                digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
                task = Parity(hooked.d_vocab, min(digits), max(digits))
                run = make_run(task, hooked.checkpoint, 8, out)
                tokenizer.pad_token = tokenizer.eos_token
                found = compare(
                    run, tokenizer, out, n_steps=options.steps, checkpointing=options.checkpointing
                )
        else:
            task = Parity(40)
            config = ModelConfig(n_layers=3, d_model=96, d_mlp=192)
            start = save_checkpoint(initial_model(config, task, seed=0), out / "start")
            run = make_run(task, start, 24, out)
            found = compare(
                run,
                organism_tokenizer(40),
                out,
                n_steps=options.steps,
                checkpointing=options.checkpointing,
            )
    ours, theirs = found
    ratios = [other / mine for mine, other in zip(ours, theirs, strict=True)]
    print("ours (s)  TRL (s)  ratio")
    print(
        f"{statistics.median(ours):8.3f} {statistics.median(theirs):8.3f} "
        f"{statistics.median(ratios):6.2f}"
    )


if __name__ == "__main__":
    main()
