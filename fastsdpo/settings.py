"""The settings of training, each defined once: default, help and flag. Imports no torch, so that `--help` is quick.

`SDPOConfig` adds them to `transformers.TrainingArguments`; the commands make an option of each that has a group
(`fastsdpo.commands.options.add_setting_options`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def setting(
    default: Any,
    help: str,
    *,
    group: str | None = None,
    flag: str | None = None,
    metavar: str | None = None,
    choices: tuple[str, ...] | None = None,
    least: int | None = None,
    above: int | None = None,
) -> Any:
    """A field of `SDPOSettings`.

    Args:
        group: of options in which the commands show it; None: it has no flag and is set with ``--set``.
        flag: None: the field's name.
        choices: the only values; None: any of the type.
        least, above: the smallest value, or the largest that is too small; None: there is none.
    """
    given = {"group": group, "flag": flag, "metavar": metavar, "choices": choices, "least": least, "above": above}
    return field(default=default, metadata={"help": help, **{k: v for k, v in given.items() if v is not None}})


@dataclass
class SDPOSettings:
    """The fields that `SDPOConfig` adds to `transformers.TrainingArguments`, or whose defaults it changes."""

    # The objective
    mode: str = setting(
        "full",
        "The objective. full matches the hindsight policy, by a divergence over the whole vocabulary. topk "
        "does so over the likeliest tokens. sampled_token is own-answer hindsight, -A log p of the answer's "
        "tokens (the paper's runs): another objective, and no estimate of full where follow-ups depend on "
        "answers.",
        group="method",
        choices=("sampled_token", "full", "topk"),
    )
    alpha: float = setting(
        1.0,
        "Which divergence: 0 is the forward KL, 1 the reverse KL, and between them Jensen-Shannon.",
        group="method",
    )
    topk: int | None = setting(
        None, "The student's K most likely tokens, for --mode topk.", group="method", metavar="K", least=1
    )
    add_tail: bool = setting(True, "mode=topk: a bucket for the rest of the vocabulary.")
    temperature: float = setting(1.0, "Divides both policies' logits.", above=0)
    is_clip: float | None = setting(
        None,
        "Weigh tokens by min(p_student / p_initial, is_clip): logged answers taken as drawn from the initial model. "
        "None: no weights.",
        above=0,
    )
    reference_kl: float = setting(
        0.0, "Weight of KL(student || initial model), without the follow-up, per token.", group="method", least=0
    )
    normalization: str = setting(
        "sequence",
        "How losses are averaged over the whole global batch. sequence: over each answer's tokens, then over "
        "answers. token: over all tokens.",
        group="method",
        choices=("sequence", "token"),
    )
    ignore_first_k: int = setting(
        0, "How many of the first tokens of each answer the loss leaves out.", group="method", metavar="K", least=0
    )

    # The teacher
    teacher: str = setting(
        "live",
        "Who teaches, with the follow-up in view. live: the model itself. ema: its moving average. frozen: "
        "the initial model. trust_region: exp((1-a) log frozen + a log live), normalized.",
        group="method",
        choices=("live", "ema", "frozen", "trust_region"),
    )
    ema_rate: float = setting(
        0.05,
        "How fast the teacher of --teacher ema follows: teacher += rate * (student - teacher) at each step.",
        group="method",
    )
    trust_region_mix: float = setting(
        0.5, "The a of --teacher trust_region: at 0 the initial model teaches, at 1 the live one."
    )
    guidance: float = setting(
        1.0,
        "How much a follow-up counts. With G the teacher is proportional to p(. | x) (p(. | x, o) / p(. | x, "
        "n))^G, all of the teacher's weights. 1, without a neutral follow-up: p(. | x, o).",
        group="method",
        metavar="G",
        above=0,
    )
    neutral_followup: str | None = setting(
        None,
        "A follow-up that says nothing, such as Okay. Its effect on the answer is subtracted from that of the "
        "user's. None: there is no such follow-up.",
        group="method",
        metavar="TEXT",
    )
    teacher_check: int = setting(
        8, "Interactions on which to compare real and unrelated follow-ups before training; 0: no check.", least=0
    )

    measure_interactions: int = setting(
        32, "Held-out interactions measured at each evaluation (docs/objectives.md); 0: none.", least=0
    )
    measure_answers: int = setting(
        8, "Of their questions, how many the model answers itself before and after training; 0: none.", least=0
    )
    measure_tokens: int = setting(64, "The most tokens of each of these answers.", least=1)

    # Text to tokens
    template: str = setting(
        "auto",
        "How the follow-up enters the prompt: the name of a template (offline-v1, online-v1, paper-table1, "
        "note), or a text with {o}. auto: note for models below a billion weights, else online-v1.",
        group="text",
        metavar="NAME|TEXT",
    )
    max_prompt_length: int | None = setting(
        2048, "The most tokens of the history.", group="text", metavar="TOKENS", least=1
    )
    max_completion_length: int | None = setting(
        2048, "The most tokens of the answer.", group="text", metavar="TOKENS", least=1
    )
    max_followup_length: int | None = setting(
        1024, "The most tokens of the follow-up.", group="text", metavar="TOKENS", least=1
    )
    truncation: str = setting(
        "shared",
        "What a prompt loses that is too long. shared: student and teacher lose the same history. "
        "independent-left: each loses its own beginning, as in the paper.",
        choices=("shared", "independent-left"),
    )
    end_of_turn: str = setting(
        "template",
        "Which token ends an answer. template: the chat template's. eos: the tokenizer's. Else the token itself.",
    )
    allow_special_tokens: bool = setting(
        False, "Whether the spelling of a control token in a message is that token. False: it is plain text."
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'More arguments of the chat template, as JSON, such as {"enable_thinking": false}.'},
    )
    chat_template_date: str | None = setting(
        None,
        "What a chat template with a clock reads: date and time in ISO form. None: the run's start, kept in the "
        "output folder for when it goes on.",
    )

    # Computation; nothing here changes the result
    sharing: str = setting(
        "auto",
        "Which shared prefixes are computed once: those of a conversation, of an interaction, or none (off). "
        "auto: conversation where the model allows it, else off.",
        group="computation",
        choices=("auto", "conversation", "interaction", "off"),
    )
    attention: str = setting(
        "auto", "Which code computes attention over shared prefixes: auto, segments, flex, flash or dense."
    )
    backend: str = setting(
        "auto", "Which code computes the loss: auto, native (CPU), triton (GPU) or reference (plain PyTorch)."
    )
    chunk_size: int | None = setting(
        None, "For how many tokens the loss holds logits at once. None: it chooses.", least=1
    )
    max_tokens_per_pack: int | None = setting(
        16384,
        "The most tokens in one forward pass (student and teacher, shared prefixes once). Larger "
        "micro-batches take several passes. None: no limit.",
        group="computation",
        metavar="TOKENS",
        least=1,
    )
    ulysses: int = setting(
        1,
        "How many processes share one pack in training, for long conversations. Each computes some of its "
        "tokens, and in the attention some of the heads.",
        group="computation",
        metavar="PROCESSES",
        least=1,
    )
    token_cache: str | None = setting(
        "auto",
        "The folder in which the tokens of data files are kept for other processes and runs. auto: "
        "~/.cache/fastsdpo/tokens, for files of 32 MB and more. None: nothing is kept.",
        group="data",
        metavar="FOLDER",
    )
    shuffle_buffer: int | None = setting(
        None,
        "With a stream: how many interactions are held, to draw the next from. 1: the order of the data. None: 1000.",
        group="data",
        metavar="N",
        least=1,
    )
    tokenizer_workers: int | None = setting(
        None,
        "How many processes tokenize a data file. None: one for each core, at most 8; one below 32 MB.",
        group="data",
        metavar="N",
        least=1,
    )
    peak_tflops: float | None = setting(
        None,
        "TFLOP/s of a card in 16-bit products, for sdpo/mfu. None: the data sheet's of cards that are known by name.",
        above=0,
    )
    auto_checkpointing: bool = setting(
        True,
        "Gradient checkpointing on GPUs for models of a billion weights and more, where nothing is said about it "
        "(gradient_checkpointing): less memory, a third more time, the same result.",
    )

    # Batches, weights, safety
    global_batch_size: int | None = setting(
        None,
        "Interactions (online: prompts) of one optimizer step, over all processes. Sets "
        "per_device_train_batch_size (--batch-size), at most to its given value, and "
        "gradient_accumulation_steps (--accumulate). None: these two decide.",
        group="optimization",
        metavar="N",
    )
    per_device_train_batch_size: int = setting(
        8,
        "Interactions (online: prompts) of one process in one micro-batch. A step takes --accumulate micro-batches.",
        group="optimization",
        flag="--batch-size",
        metavar="N",
        least=1,
    )
    gradient_accumulation_steps: int = setting(
        1, "Micro-batches of one optimizer step.", group="optimization", flag="--accumulate", metavar="N", least=1
    )
    dtype: str | None = setting(
        None,
        "The dtype of the weights of a model given by name: float32, bfloat16, float16, auto (the checkpoint's). "
        "None: float32 on a CPU, else auto.",
    )
    group_by_conversation: bool | None = setting(
        None,
        "Keep a conversation's interactions together in the shuffled order. None: where sharing is by conversation.",
    )
    weight_update: str = setting(
        "auto",
        "For bfloat16 weights: plain (most small steps are rounded away), float32_master (optim=adamw_torch), "
        "stochastic_rounding (optim=adamw_torch, or adamw_torch_8bit of torchao: 6 bytes a weight in all). auto: "
        "float32_master with adamw_torch, stochastic_rounding with adamw_torch_8bit, else plain and a warning.",
        choices=("auto", "plain", "float32_master", "stochastic_rounding"),
    )
    sync_each_pass: bool = setting(
        False,
        "FSDP2: Sum the gradients over the processes in every pass, not only in a step's last. Whole gradients then "
        "need no room, and each pass sends its own.",
    )
    async_checkpoints: bool = setting(
        False, "FSDP2: checkpoints are written from copies of the shards in memory while training goes on."
    )
    non_finite: str = setting(
        "stop",
        "A loss or gradient that is not finite: stop with the interactions' ids, or skip the step and count.",
        choices=("stop", "skip"),
    )
    allow_leaks: bool = setting(
        False,
        "Warn, and do not refuse, where a held-out interaction or another part of its conversation is in the "
        "training data.",
    )
    disable_dropout: bool = setting(
        True,
        "Turn off every dropout and router jitter, and refuse a model that stays noisy in training (a teacher with "
        "noise is no teacher).",
    )

    # Fields of TrainingArguments, most with another default
    learning_rate: float = setting(
        2e-6, "The largest learning rate of the run.", group="optimization", metavar="RATE", least=0
    )
    lr_scheduler_type: str = setting(
        "cosine",
        "How the learning rate changes over the run: cosine, constant, constant_with_warmup, linear, and "
        "others that transformers knows.",
        group="optimization",
        flag="--schedule",
        metavar="NAME",
    )
    warmup_steps: float = setting(
        0.05,
        "How many steps the learning rate takes to rise from 0. Below 1: a share of all steps. The schedule constant "
        "has none.",
        group="optimization",
        flag="--warmup",
        metavar="STEPS",
        least=0,
    )
    num_train_epochs: float = setting(
        2.0, "Passes over the data.", group="optimization", flag="--epochs", metavar="N", above=0
    )
    max_steps: int = setting(
        -1,
        "How many optimizer steps to take, instead of --epochs. -1: --epochs decides.",
        group="optimization",
        metavar="N",
    )
    max_grad_norm: float | None = setting(
        1.0,
        "Gradients are scaled down to this norm. 0: they are not.",
        group="optimization",
        flag="--clip",
        metavar="NORM",
        least=0,
    )
    seed: int = setting(
        42, "Decides the order of the data, and the first weights of a new adapter.", group="optimization", least=0
    )
    bf16: bool | None = setting(
        None, "Products in bfloat16 (autocast). None: on GPUs that have it, but where dtype or fp16 asks for another."
    )
    dataloader_num_workers: int | None = setting(
        None, "Processes that make the packs of the next steps. None: 2 where a GPU would wait for them, else 0."
    )
    logging_steps: float = setting(
        10, "Steps between two logs of the loss. Below 1: a share of all steps.", group="logs", metavar="STEPS"
    )
    logging_first_step: bool = setting(True, "Log the loss of the first step too.")
    remove_unused_columns: bool = setting(False, "Must stay off: interactions are objects, without columns.")
    logging_nan_inf_filter: bool = setting(False, "Must stay off: it would hide what non_finite looks for.")
    ddp_broadcast_buffers: bool | None = setting(
        False, "Whether DDP sends the first process's buffers before each pass."
    )


def changed(name: str, default: Any, help: str | None = None) -> Any:
    """A field of `SDPOSettings` with another default, and where given another help."""
    metadata = SDPOSettings.__dataclass_fields__[name].metadata
    return field(default=default, metadata={**metadata, "help": help or metadata["help"]})


# Settings of logged interactions, which come before the answers: online they keep their defaults.
OFFLINE = ("teacher_check", "measure_interactions", "measure_answers", "measure_tokens", "allow_leaks")
OFFLINE += ("token_cache", "tokenizer_workers", "group_by_conversation", "shuffle_buffer")


@dataclass
class OnlineSDPOSettings(SDPOSettings):
    """The fields that `OnlineSDPOConfig` adds to `SDPOConfig`, or whose defaults it changes."""

    # Answers
    num_generations: int = setting(
        1, "How many answers are sampled for each prompt.", group="answers", metavar="N", least=1
    )
    max_new_tokens: int = setting(256, "The most tokens of an answer.", group="answers", metavar="TOKENS", least=1)
    sampling_temperature: float | None = setting(
        1.0,
        "How freely answers are sampled. Only at 1 do they follow the model's own distribution. None: as the "
        "model's generation config samples, with its top-k, top-p and penalties.",
        group="answers",
        metavar="T",
        above=0,
    )
    generation_batch_size: int | None = setting(
        None, "How many answers are sampled at once. None: all of a step.", group="answers", metavar="N", least=1
    )
    eval_max_new_tokens: int | None = setting(
        None,
        "The most tokens of a held-out answer. None: as many as of others.",
        group="answers",
        metavar="TOKENS",
        least=1,
    )
    eval_temperature: float = setting(
        0.0, "How freely held-out answers are sampled. 0: always the likeliest token.", least=0
    )
    generation_url: str | None = setting(
        None,
        "An OpenAI-compatible server (vLLM) that samples the answers. None: this process samples them.",
        group="answers",
        metavar="URL",
    )
    generation_model: str | None = setting(None, "The model's name on that server; None: its first.")
    generation_sync: str = setting(
        "lora",
        "How the server gets the trained weights: lora (the adapter is loaded by name at each step), weights (all of "
        "them, by vLLM's weight transfer), or none (its answers are off-policy; use is_clip or ppo_clip).",
        choices=("lora", "weights", "none"),
    )

    # The online objective
    updates_per_batch: int = setting(
        1,
        "How many optimizer steps are taken on each batch of sampled answers.",
        group="answers",
        metavar="STEPS",
        least=1,
    )
    ppo_clip: float | None = setting(
        None, "mode=sampled_token: clip the probability ratio to sampling time to 1 +- this. None: no ratio."
    )
    center_advantages: bool = setting(
        False,
        "With ppo_clip: subtract each answer's mean advantage. The loss is logged without that, since it would be 0.",
    )

    # Safety
    stop_when_degenerate: float | None = setting(
        None,
        "Stop, with a checkpoint, where this share of the answers to the last degenerate_window interactions "
        "is degenerate (empty, or repeating itself). None: report only.",
        group="answers",
        metavar="SHARE",
    )
    degenerate_window: int = setting(32, "Interactions that stop_when_degenerate looks back on.", least=1)
    min_entropy_share: float = setting(0.2, "Entropy collapse: below this share of the first window's entropy.")
    log_interactions: bool = setting(True, "Write interactions.jsonl and eval_answers.jsonl to the output folder.")

    # Changed defaults
    teacher_check: int = changed(
        "teacher_check", 0, "Not used: there is no follow-up to check before the first answer."
    )
    measure_interactions: int = changed("measure_interactions", 0, "Not used: held-out prompts are answered.")
    measure_answers: int = changed("measure_answers", 0, "Not used: held-out prompts are answered.")
    dataloader_num_workers: int | None = changed(
        "dataloader_num_workers", 0, "Processes that load prompts; packs are made where the answers are."
    )
    learning_rate: float = changed("learning_rate", 5e-6)
    lr_scheduler_type: str = changed("lr_scheduler_type", "constant")
    warmup_steps: float = changed("warmup_steps", 0)
    num_train_epochs: float = changed("num_train_epochs", 1.0, "Passes over the prompts.")
    max_grad_norm: float | None = changed("max_grad_norm", 1.0)
    logging_steps: float = changed("logging_steps", 1)
