"""fastsdpo as the loss of other trainers; each module needs its own package, so import it by name.

``fastsdpo.integrations.trl``, ``.verl``, ``.sdpo_fork``, ``.transformers``, ``.vllm``.
"""
