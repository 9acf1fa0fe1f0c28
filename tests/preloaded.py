"""Imports all that `fastsdpo prepare`, `train` and `online` import when they run, the tiny models included.

For processes that are forked many times: these are 3,400 modules, and take most of the time of a run on a tiny model.
What is there is hidden from the garbage collector, which would pass over it, and so copy it, in every fork.
"""

import contextlib
import gc
import importlib

from fastsdpo.cli import COMMANDS

RUN = ["fastsdpo.commands.train_run", "fastsdpo.commands.online_run", "fastsdpo.trainer.trainer"]
RUN += ["fastsdpo.online.trainer", "fastsdpo.online.own_answers"]
MODELS = ["transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"]

for name in (*(COMMANDS[command][0] for command in ("prepare", "train", "online")), *RUN, *MODELS):
    importlib.import_module(name)
for name in ("matplotlib.figure", "matplotlib.backends.backend_agg", "peft"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
gc.collect()
gc.freeze()
