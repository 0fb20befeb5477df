"""A tiny language model whose tokenizer writes digits one by one, or joins them."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mechinterp.checkpoints import Checkpoint, save_checkpoint

CORPUS = ["Sum: 3+5=08 answer 08", "answer 17 answer 17 = 17", "State the final answer to 4 + 4 ="]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def text_tokenizer(*, joined: bool = False) -> PreTrainedTokenizerFast:
    bytes_ = ByteLevel(add_prefix_space=False, use_regex=not joined)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = (
        bytes_ if joined else Sequence([Digits(individual_digits=True), bytes_])
    )
    from tokenizers.decoders import ByteLevel as Bytes

    tokenizer.decoder = Bytes()
    tokenizer.train_from_iterator(
        CORPUS,
        BpeTrainer(
            vocab_size=400,
            special_tokens=["<end>"],
            initial_alphabet=ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", chat_template=TEMPLATE
    )


def text_checkpoint(path: Path, *, joined: bool = False) -> Checkpoint:
    tokenizer = text_tokenizer(joined=joined)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    return save_checkpoint(LlamaForCausalLM(config), path, tokenizer=tokenizer)
