"""fastsdpo as the loss of other trainers; each module needs its own package, so import it by name.

``fastsdpo.integrations.trl``, ``.swift``, ``.axolotl``, ``.torchrl``, ``.generalized_jsd``, ``.verl``,
``.verl_self_teacher``, ``.sdpo_fork``, ``.transformers``; teachers elsewhere: ``.vllm``, ``.sglang``,
``.hidden_states``.
"""
