#!/usr/bin/env bash
# Figures 7 and 8: the follow-up's signal over the model's own answers, relevant against unrelated, one strip a case.
# CASES: JSON with raw_prompt, followup_message and unrelated_followup, as published with the paper's code.
. "$(dirname "$0")/common.sh"
CASES=$(source_of cases.json "${CASES:-cases.json}")

fastsdpo signal --cases "$CASES" --model "$MODEL" --template offline-v1 "${ANSWERS[@]}" --heatmap "$OUT/heatmap.png" \
  --json "$OUT/signal.json"
