"""Student and teacher over the same conversations, every shared prefix computed once.

    checks -> forward -> session -> ready -> passes -> attention, model -> plan -> trie
                                    pack -> plan

Words, in this package and in the trainer:

interaction  a prompt, a completion (the response) and a teacher prompt, as token ids. It has two *sequences*: the
             student's is prompt + completion, the teacher's is teacher prompt + completion.
micro-batch  the interactions that the data loader gives a process at once. It is cut into packs.
pack         interactions that are computed together, within a budget of tokens (`pack_conversations`).
plan         the tokens that a pack has to compute, each shared prefix once, and their order (`build_plan`).
run          a chain of packed tokens without a gap, each the continuation of the one before it.
segment      an unbroken part of a run; what a run attends to in the runs above it are segments.
row          a token whose hidden state predicts a response token: N rows per pack, response after response.
pass         tokens that go through the decoder together. The student's pass carries the gradient, the teacher's none.
session      one forward call of the model as the caller wrapped it, with all passes over a pack and the loss in it.
"""

from fastsdpo.prefix.bundle import Bundle as Bundle
from fastsdpo.prefix.checks import check_head as check_head
from fastsdpo.prefix.checks import check_passes as check_passes
from fastsdpo.prefix.checks import check_sharing as check_sharing
from fastsdpo.prefix.forward import ResponseStates as ResponseStates
from fastsdpo.prefix.forward import shared_forward as shared_forward
from fastsdpo.prefix.model import HeadParameters as HeadParameters
from fastsdpo.prefix.model import before_head as before_head
from fastsdpo.prefix.model import causal_lm as causal_lm
from fastsdpo.prefix.model import decoder_of as decoder_of
from fastsdpo.prefix.model import head_parameters as head_parameters
from fastsdpo.prefix.model import is_wrapped as is_wrapped
from fastsdpo.prefix.model import model_device as model_device
from fastsdpo.prefix.model import no_grad_pass as no_grad_pass
from fastsdpo.prefix.model import text_inputs as text_inputs
from fastsdpo.prefix.model import training_mode as training_mode
from fastsdpo.prefix.model import unwrap as unwrap
from fastsdpo.prefix.pack import TokenCounts as TokenCounts
from fastsdpo.prefix.pack import count_tokens as count_tokens
from fastsdpo.prefix.pack import pack_conversations as pack_conversations
from fastsdpo.prefix.partitioned import gathered as gathered
from fastsdpo.prefix.partitioned import gathered_layers as gathered_layers
from fastsdpo.prefix.partitioned import is_partitioned as is_partitioned
from fastsdpo.prefix.partitioned import whole_shapes as whole_shapes
from fastsdpo.prefix.partitioned import whole_size as whole_size
from fastsdpo.prefix.passes import run_inside as run_inside
from fastsdpo.prefix.plan import Plan as Plan
from fastsdpo.prefix.plan import ResponseLabels as ResponseLabels
from fastsdpo.prefix.plan import Sharing as Sharing
from fastsdpo.prefix.plan import build_plan as build_plan
from fastsdpo.prefix.probe import probe_ids as probe_ids
from fastsdpo.prefix.ready import ReadyPasses as ReadyPasses
from fastsdpo.prefix.ready import ready_passes as ready_passes
from fastsdpo.prefix.refusals import above_the_decoder as above_the_decoder
from fastsdpo.prefix.refusals import rotary_limit as rotary_limit
from fastsdpo.prefix.refusals import sharing_limit as sharing_limit
from fastsdpo.prefix.session import ForwardSession as ForwardSession
from fastsdpo.prefix.ulysses import Ulysses as Ulysses
from fastsdpo.prefix.ulysses import not_divisible as not_divisible
