#!/usr/bin/env bash
# Figure 6: three preferences in sequence, 500 interactions each. Each is judged over all checkpoints against the
# checkpoint at which it begins (steps of 16: 500 interactions end in step 32, which has seen 512).
. "$(dirname "$0")/common.sh"
TASK=${TASK:-helpsteer2}
PROMPTS=1536
. "$HERE/prompts.sh"
WISHES=(no-emojis no-filler-praise direct)
FLIPS=(512 1024)
ONSETS=(checkpoint-32 checkpoint-64)
if [ -n "$TINY" ]; then FLIPS=(4 8) ONSETS=(checkpoint-1 checkpoint-2); fi

launch online "$OUT/prompts.jsonl" --model "$MODEL" -o "$OUT/run" --preset paper "${SYSTEM[@]}" --save-steps 1 \
  --save-total-limit 128 --persona "${WISHES[0]}" --flip-at "${FLIPS[0]}" --then-persona "${WISHES[1]}" \
  --flip-at "${FLIPS[1]}" --then-persona "${WISHES[2]}" \
  "${USER_MODEL[@]}" "${HARDWARE[@]}" "${LIMITS[@]}" "${ANSWERS[@]}" --resume
BASES=("$MODEL" "$OUT/run/${ONSETS[0]}" "$OUT/run/${ONSETS[1]}")
for N in 0 1 2; do
  fastsdpo eval "$OUT/prompts.eval.jsonl" --checkpoints "$OUT/run" --base "${BASES[$N]}" "${SYSTEM[@]}" \
    "${JUDGE[@]}" --persona "${WISHES[$N]}" "${ANSWERS[@]}" -o "$OUT/curve-${WISHES[$N]}.json"
done
