"""Student and teacher branches of many interactions, every shared prefix computed once."""

from fastsdpo.prefix.checks import check_head as check_head
from fastsdpo.prefix.checks import check_passes as check_passes
from fastsdpo.prefix.checks import check_sharing as check_sharing
from fastsdpo.prefix.forward import ResponseStates as ResponseStates
from fastsdpo.prefix.forward import shared_forward as shared_forward
from fastsdpo.prefix.model import HeadParameters as HeadParameters
from fastsdpo.prefix.model import causal_lm as causal_lm
from fastsdpo.prefix.model import head_parameters as head_parameters
from fastsdpo.prefix.model import is_wrapped as is_wrapped
from fastsdpo.prefix.model import no_grad_pass as no_grad_pass
from fastsdpo.prefix.model import text_inputs as text_inputs
from fastsdpo.prefix.model import training_mode as training_mode
from fastsdpo.prefix.model import unwrap as unwrap
from fastsdpo.prefix.pack import TokenCounts as TokenCounts
from fastsdpo.prefix.pack import count_tokens as count_tokens
from fastsdpo.prefix.pack import pack_conversations as pack_conversations
from fastsdpo.prefix.passes import run_inside as run_inside
from fastsdpo.prefix.plan import Plan as Plan
from fastsdpo.prefix.plan import build_plan as build_plan
from fastsdpo.prefix.refusals import above_the_decoder as above_the_decoder
from fastsdpo.prefix.refusals import rotary_limit as rotary_limit
from fastsdpo.prefix.session import ForwardSession as ForwardSession
