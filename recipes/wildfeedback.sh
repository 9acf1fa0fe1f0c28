#!/usr/bin/env bash
# Training on logged conversations, WildFeedback: two epochs of the sampled-token objective, 32 interactions a step over
# all GPUs, learning rate 2e-6 with a cosine. MODEL: Qwen/Qwen3-8B, Qwen/Qwen3-4B, allenai/Olmo-3-7B-Instruct-SFT.
. "$(dirname "$0")/common.sh"
SOURCE=(microsoft/WildFeedback --subset wildfeedback)
if [ -n "$TINY" ]; then SOURCE=("$HERE/tiny/wildfeedback.jsonl"); fi

fastsdpo prepare "${SOURCE[@]}" -o "$OUT/interactions.jsonl" --preset paper-wildfeedback --overwrite
launch train "$OUT/interactions.jsonl" --model "$MODEL" -o "$OUT/run" --preset paper "${HARDWARE[@]}" "${LIMITS[@]}" --resume
