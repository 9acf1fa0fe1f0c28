r"""Attention over a plan: every token sees its own run up to itself, and slices of the runs above.

A transformers model calls `plan_attention` in place of its own attention function, through the
public `AttentionInterface`, for the passes that carry a `SharedPass` and for no other. Backends:

``segments``  any device. A run is split into *blocks* (queries x unbroken keys, full or causal or
    within a band), each computed by a fused kernel without a mask where none is needed, and merged
    by their log-sum-exps. For blocks b of one query with outputs o_b and log-sum-exps l_b,

        lse = log sum_b exp(l_b),     out = sum_b exp(l_b - lse) o_b,

    and the kernel's own backward pass, given the merged ``out`` and ``lse`` in place of a block's,
    returns exactly the block's share of the gradients (dS = P * (dP - rowsum(dO * out))). Keys and
    values are read in place: none is copied, concatenated or repeated for grouped queries, and no
    full-size gradient is made per slice. Memory is linear in the tokens.
``flex``  GPUs: one compiled flex_attention call, its block mask made from the walk's times.
``flash`` GPUs, with the package flash-attn: one varlen call; the keys of each run are gathered
    behind those of its ancestors, and flash-attn's causal mask is aligned at the end.
``dense`` any device: one scaled_dot_product_attention call with a mask of queries x keys.

Sliding windows are honoured by all four. None of the GPU paths has run on a GPU yet.
"""

from fastsdpo.prefix.attention.dense import visible as visible
from fastsdpo.prefix.attention.flash import VarlenIndex as VarlenIndex
from fastsdpo.prefix.attention.flash import varlen_index as varlen_index
from fastsdpo.prefix.attention.interface import BACKENDS as BACKENDS
from fastsdpo.prefix.attention.interface import BackendError as BackendError
from fastsdpo.prefix.attention.interface import check_backend as check_backend
from fastsdpo.prefix.attention.interface import choose_backend as choose_backend
from fastsdpo.prefix.attention.interface import plan_attention as plan_attention
from fastsdpo.prefix.attention.segments import BAND_BLOCK as BAND_BLOCK
from fastsdpo.prefix.attention.segments import Block as Block
from fastsdpo.prefix.attention.segments import run_blocks as run_blocks
from fastsdpo.prefix.attention.shared_pass import KeysValues as KeysValues
from fastsdpo.prefix.attention.shared_pass import SharedPass as SharedPass
from fastsdpo.prefix.attention.switch import attention_windows as attention_windows
from fastsdpo.prefix.attention.switch import let_attention_switch as let_attention_switch
