"""Student and teacher branches of many interactions, every shared prefix computed once."""

from fastsdpo.prefix.forward import HeadParameters as HeadParameters
from fastsdpo.prefix.forward import ResponseStates as ResponseStates
from fastsdpo.prefix.forward import head_parameters as head_parameters
from fastsdpo.prefix.forward import shared_forward as shared_forward
