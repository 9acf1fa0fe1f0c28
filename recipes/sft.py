"""TRL's SFTTrainer on the answers that ``fastsdpo prepare --layout trl`` writes: DATA MODEL OUTPUT [--tiny]."""

import sys
from pathlib import Path

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

data, model, output, *rest = sys.argv[1:]
small = (
    {"max_steps": 1, "use_cpu": True, "bf16": False, "per_device_train_batch_size": 2} if rest == ["--tiny"] else {}
)
settings = {
    "learning_rate": 2e-6,  # batch, schedule and epochs as for SDPO
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,  # divide by the number of GPUs: the paper's 32 are global
    "max_length": 4096,
    "completion_only_loss": True,
    "bf16": True,
    "report_to": [],
    **small,
}
rows = load_dataset("json", data_files=data, split="train").select_columns(["prompt", "completion"])
trainer = SFTTrainer(model, args=SFTConfig(output_dir=output, **settings), train_dataset=rows)
trainer.train()
trainer.save_model(str(Path(output, "model")))
