# Read by every recipe: names, how commands are started, and what --tiny changes.
#   MODEL, OUT, GPUS     the model, the folder for results, processes to start (default: one per GPU)
#   JUDGE_URL, JUDGE_MODEL    an OpenAI-compatible endpoint that plays the user and judges
set -euo pipefail

TINY=""
[ "${1:-}" = "--tiny" ] && TINY=1
PYTHON=${PYTHON:-python}
MODEL=${MODEL:-Qwen/Qwen3-8B}
OUT=${OUT:-runs/$(basename "$0" .sh)}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$OUT"

# What a machine of GPUs takes. 8-bit AdamW on bfloat16 weights is what the paper trains with; it needs bitsandbytes.
HARDWARE=(--dtype bfloat16 --set optim=adamw_bnb_8bit --set weight_update=plain --gradient-checkpointing)
LIMITS=()  # added to every training
ANSWERS=() # added to everything that writes answers
USER_MODEL=(--user-url "${JUDGE_URL:-http://localhost:8000/v1}" --user-model "${JUDGE_MODEL:-Qwen/Qwen3-32B}")
JUDGE=(--judge-url "${JUDGE_URL:-http://localhost:8000/v1}" --judge-model "${JUDGE_MODEL:-Qwen/Qwen3-32B}")

if [ -n "$TINY" ]; then
  MODEL=${TINY_MODEL:?--tiny needs TINY_MODEL, the folder of a small model}
  HARDWARE=(--device cpu)
  LIMITS=(--max-steps 2 --global-batch-size 4)
  ANSWERS=(--max-new-tokens 4)
  USER_MODEL=(--user-local "$MODEL")
  JUDGE=(--judge-local "$MODEL")
fi

fastsdpo() { "$PYTHON" -m fastsdpo "$@"; }

# The same command by all GPUs: launch train ..., launch online ...
launch() {
  local count=${GPUS:-$([ -n "$TINY" ] && echo 1 || nvidia-smi --list-gpus | wc -l)}
  if [ "$count" -le 1 ]; then
    fastsdpo "$@"
  else
    "$PYTHON" -m torch.distributed.run --nproc-per-node "$count" -m fastsdpo "$@"
  fi
}

# Conversations and prompts: the data sets of the hub, or the lines of tiny/ .
source_of() { if [ -n "$TINY" ]; then echo "$HERE/tiny/$1"; else echo "$2"; fi; }
