"""Student and teacher branches of many interactions, every shared prefix computed once."""

from fastsdpo.prefix.forward import HeadParameters as HeadParameters
from fastsdpo.prefix.forward import ResponseStates as ResponseStates
from fastsdpo.prefix.forward import above_the_decoder as above_the_decoder
from fastsdpo.prefix.forward import causal_lm as causal_lm
from fastsdpo.prefix.forward import check_head as check_head
from fastsdpo.prefix.forward import check_passes as check_passes
from fastsdpo.prefix.forward import check_sharing as check_sharing
from fastsdpo.prefix.forward import head_parameters as head_parameters
from fastsdpo.prefix.forward import is_wrapped as is_wrapped
from fastsdpo.prefix.forward import no_grad_pass as no_grad_pass
from fastsdpo.prefix.forward import rotary_limit as rotary_limit
from fastsdpo.prefix.forward import run_inside as run_inside
from fastsdpo.prefix.forward import shared_forward as shared_forward
from fastsdpo.prefix.forward import training_mode as training_mode
from fastsdpo.prefix.forward import unwrap as unwrap
from fastsdpo.prefix.pack import Plan as Plan
from fastsdpo.prefix.pack import TokenCounts as TokenCounts
from fastsdpo.prefix.pack import build_plan as build_plan
from fastsdpo.prefix.pack import count_tokens as count_tokens
from fastsdpo.prefix.pack import pack_conversations as pack_conversations
