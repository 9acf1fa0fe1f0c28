#!/usr/bin/env bash
# Trains with verl towards the actor itself with the user's follow-up in view, in this folder:
#
#   fastsdpo prepare conversations.json -o interactions.jsonl
#   bash run.sh interactions.jsonl Qwen/Qwen3-8B trainer.n_gpus_per_node=8 trainer.total_epochs=1
set -euo pipefail
cd "$(dirname "$0")"
interactions=$(realpath "$1") model=$2
shift 2
python prepare.py "$interactions" --model "$model" -o train.parquet
VERL_USE_EXTERNAL_MODULES=self_teacher PYTHONPATH=. python -m verl.trainer.main_ppo \
  --config-path "$PWD" --config-name self_teacher actor_rollout_ref.model.path="$model" \
  data.train_files="$PWD/train.parquet" data.val_files="$PWD/train.parquet" \
  reward.custom_reward_function.path="$PWD/no_reward.py" "$@"
