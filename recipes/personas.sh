#!/usr/bin/env bash
# A user played by a language model reacts to summaries (TASK=tldr) or answers (TASK=helpsteer2): 16 interactions a step,
# then the win rate of each checkpoint against the initial model, also without ties.
# PERSONA: no-emojis, no-filler-praise, direct, concise-casual-beginner, detailed-professional-expert, or @FILE.
. "$(dirname "$0")/common.sh"
. "$HERE/prompts.sh"

launch online "$OUT/prompts.jsonl" --model "$MODEL" -o "$OUT/run" --preset paper "${SYSTEM[@]}" --save-steps 1 \
  --save-total-limit 64 --persona "$PERSONA" "${USER_MODEL[@]}" "${HARDWARE[@]}" "${LIMITS[@]}" "${ANSWERS[@]}" --resume
fastsdpo eval "$OUT/prompts.eval.jsonl" --checkpoints "$OUT/run" --base "$MODEL" "${SYSTEM[@]}" \
  "${JUDGE[@]}" --persona "$PERSONA" "${ANSWERS[@]}" -o "$OUT/curve.json"
