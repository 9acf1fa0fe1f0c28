#!/usr/bin/env bash
# The in-context oracle: the initial model against itself with the persona in its system prompt. The oracle is --base, so
# its own win rate is one minus what is printed. TRAINED=folder compares a trained model with the oracle.
. "$(dirname "$0")/common.sh"
. "$HERE/prompts.sh"

fastsdpo eval "$OUT/prompts.eval.jsonl" --model "${TRAINED:-$MODEL}" --base "$MODEL" --base-system "$PERSONA" "${SYSTEM[@]}" \
  "${JUDGE[@]}" --persona "$PERSONA" "${ANSWERS[@]}" -o "$OUT/oracle.json"
