#!/usr/bin/env bash
# Figure 4: after 250 interactions the user wants the opposite. Judged against the initial model for both wishes.
. "$(dirname "$0")/common.sh"
. "$HERE/prompts.sh"
AT=250
if [ -n "$TINY" ]; then AT=4; fi
THEN=detailed-professional-expert

launch online "$OUT/prompts.jsonl" --model "$MODEL" -o "$OUT/run" --preset paper "${SYSTEM[@]}" --save-steps 1 \
  --save-total-limit 64 --persona "$PERSONA" --flip-at $AT --then-persona $THEN \
  "${USER_MODEL[@]}" "${HARDWARE[@]}" "${LIMITS[@]}" "${ANSWERS[@]}" --resume
for WISH in "$PERSONA" $THEN; do
  fastsdpo eval "$OUT/prompts.eval.jsonl" --checkpoints "$OUT/run" --base "$MODEL" "${SYSTEM[@]}" \
    "${JUDGE[@]}" --persona "$WISH" "${ANSWERS[@]}" -o "$OUT/curve-$(basename "$WISH").json"
done
