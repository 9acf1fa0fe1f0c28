#!/usr/bin/env bash
# The same on WildChat: 15,000 conversations, or 14,000 with 50,000 interactions. Settings as in wildfeedback.sh.
. "$(dirname "$0")/common.sh"
SOURCE=$(source_of conversations.jsonl allenai/WildChat)

fastsdpo prepare "$SOURCE" -o "$OUT/interactions.jsonl" --preset paper-wildchat --keep model --overwrite
launch train "$OUT/interactions.jsonl" --model "$MODEL" -o "$OUT/run" --preset paper "${HARDWARE[@]}" "${LIMITS[@]}" --resume
