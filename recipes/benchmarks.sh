#!/usr/bin/env bash
# The benchmarks of a trained model (TRAINED) and of the model it comes from (MODEL).
#   IFEval        curl -LO .../instruction_following_eval/data/input_data.jsonl (the address: fastsdpo eval --help)
#   AlpacaEval    alpaca_eval.json of tatsu-lab/alpaca_eval; judged by: alpaca_eval --model_outputs answers.json
#   Arena-Hard    question.jsonl of arena-hard-v2.0 of lmarena/arena-hard-auto; its own scripts judge the file
#   the others    pip install lm-eval; LoRA adapters are merged first: fastsdpo merge
. "$(dirname "$0")/common.sh"
TRAINED=${TRAINED:-$MODEL}
IFEVAL=$(source_of ifeval.jsonl input_data.jsonl)
ALPACA=$(source_of alpaca_eval.json alpaca_eval.json)
ARENA=$(source_of arena_hard.jsonl question.jsonl)
LONG=(--max-new-tokens 1280)
if [ -n "$TINY" ]; then LONG=("${ANSWERS[@]}"); fi

fastsdpo eval "$IFEVAL" --benchmark ifeval --model "$TRAINED" --base "$MODEL" "${LONG[@]}" -o "$OUT/ifeval.json"
fastsdpo eval "$ALPACA" --write alpaca_eval --model "$TRAINED" --generator mine "${LONG[@]}" -o "$OUT/alpaca_eval.json"
fastsdpo eval "$ARENA" --write arena_hard --model "$TRAINED" --generator mine "${LONG[@]}" -o "$OUT/arena_hard.jsonl"

if [ -z "$TINY" ]; then
  "$PYTHON" -m lm_eval --model hf --model_args "pretrained=$TRAINED,dtype=bfloat16" --apply_chat_template \
    --batch_size auto --tasks mmlu_pro,truthfulqa_mc1,hellaswag,commonsense_qa --output_path "$OUT/lm_eval"
elif "$PYTHON" -c "import lm_eval" 2>/dev/null; then # a task over a local file, which is found from its folder
  TRAINED=$(realpath "$TRAINED") OUT=$(realpath "$OUT")
  cd "$HERE/tiny"
  "$PYTHON" -m lm_eval --model hf --model_args "pretrained=$TRAINED" --device cpu --batch_size 1 \
    --include_path . --tasks tiny_choice --output_path "$OUT/lm_eval"
else
  echo "lm-eval is not installed: its task is left out"
fi
