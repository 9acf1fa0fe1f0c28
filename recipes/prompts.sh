# Read by the recipes with a simulated user: the prompts of TASK, its system prompt, and the default persona.
TASK=${TASK:-tldr}
PERSONA=${PERSONA:-concise-casual-beginner}
SYSTEM=()
if [ "$TASK" = tldr ]; then
  SYSTEM=(--system "Summarize the post in one or two sentences. Begin with 'TL;DR:' and write nothing else.")
  HUB=(openai/summarize_from_feedback --subset comparisons --eval-split validation)
else
  HUB=(nvidia/HelpSteer2 --eval-split validation)
fi
if [ -n "$TINY" ]; then HUB=("$HERE/tiny/$TASK.jsonl" --eval-source "$HERE/tiny/${TASK}_held_out.jsonl"); fi

fastsdpo prepare --prompts "$TASK" "${HUB[@]}" -o "$OUT/prompts.jsonl" --tokenizer "$MODEL" "${SYSTEM[@]}" \
  --max-prompts "${PROMPTS:-512}" --max-eval-prompts 256 --overwrite
