#!/usr/bin/env bash
# The baseline of table 4: supervised training on the logged answers, without the follow-ups, by TRL (sft.py).
. "$(dirname "$0")/common.sh"
SOURCE=$(source_of conversations.jsonl allenai/WildChat)

fastsdpo prepare "$SOURCE" -o "$OUT/interactions.jsonl" --preset paper-wildchat --layout trl --overwrite
"$PYTHON" "$HERE/sft.py" "$OUT/interactions.jsonl" "$MODEL" "$OUT/run" ${TINY:+--tiny}
