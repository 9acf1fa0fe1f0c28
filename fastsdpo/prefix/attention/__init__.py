r"""Attention over a plan: every token attends to its own run up to itself, and to segments of the runs above.

A transformers model calls `plan_attention` in place of its own attention function, through the public
`AttentionInterface`, in the passes that carry a `SharedPass` and in no other. Backends:

``segments``  any device. A run is split into *blocks*: queries x unbroken keys, full, causal or within a
    band. A fused kernel computes each block, without a mask where none is needed, and the blocks are merged by
    their log-sum-exps. For the blocks b of one query with outputs o_b and log-sum-exps l_b,

        lse = log sum_b exp(l_b),     out = sum_b exp(l_b - lse) o_b.

    The kernel's own backward pass gets the merged ``out`` and ``lse`` in place of the block's own, and then
    returns exactly the block's share of the gradients (dS = P * (dP - rowsum(dO * out))). Keys and values are
    read in place: none is copied, concatenated or repeated for grouped queries, and no block has a gradient of
    full size. Memory is linear in the tokens.
``flash`` GPUs, half precision: a few calls of torch's varlen attention to a layer, on keys in place, merged in the
    same way; see `flash`. A layer whose sliding window cuts a sequence short runs in ``flex``.
``flex``  GPUs: one compiled flex_attention call; its block mask is counted from the runs, without looking at
    queries x keys.
``dense`` any device: one scaled_dot_product_attention call with a mask of queries x keys.

All four respect sliding windows and chunks. Models with attention of their own get a mask (`own`). None of the GPU
paths has run on a GPU yet.
"""

from fastsdpo.prefix.attention.dense import visible as visible
from fastsdpo.prefix.attention.flash import flash_calls as flash_calls
from fastsdpo.prefix.attention.flex import block_mask as block_mask
from fastsdpo.prefix.attention.interface import BACKENDS as BACKENDS
from fastsdpo.prefix.attention.interface import BackendError as BackendError
from fastsdpo.prefix.attention.interface import automatic_backends as automatic_backends
from fastsdpo.prefix.attention.interface import check_backend as check_backend
from fastsdpo.prefix.attention.interface import choose_backend as choose_backend
from fastsdpo.prefix.attention.interface import meta_autocast as meta_autocast
from fastsdpo.prefix.attention.interface import plan_attention as plan_attention
from fastsdpo.prefix.attention.kernels import ShapeAttention as ShapeAttention
from fastsdpo.prefix.attention.own import attending_alone as attending_alone
from fastsdpo.prefix.attention.own import attends_alone as attends_alone
from fastsdpo.prefix.attention.own import functional_dropout as functional_dropout
from fastsdpo.prefix.attention.own import plan_masks as plan_masks
from fastsdpo.prefix.attention.segments import BAND_BLOCK as BAND_BLOCK
from fastsdpo.prefix.attention.segments import Block as Block
from fastsdpo.prefix.attention.segments import run_blocks as run_blocks
from fastsdpo.prefix.attention.shared_pass import Kept as Kept
from fastsdpo.prefix.attention.shared_pass import Scoring as Scoring
from fastsdpo.prefix.attention.shared_pass import SharedPass as SharedPass
from fastsdpo.prefix.attention.switch import attention_modules as attention_modules
from fastsdpo.prefix.attention.switch import let_attention_switch as let_attention_switch
from fastsdpo.prefix.attention.windows import ChunkWindow as ChunkWindow
from fastsdpo.prefix.attention.windows import Window as Window
from fastsdpo.prefix.attention.windows import attention_windows as attention_windows
