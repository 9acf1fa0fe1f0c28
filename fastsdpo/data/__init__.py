"""Turns conversations into tokenized interactions. It imports only the standard library.

    load_conversations -> ConversationFilter -> extract_interactions -> tokenize_interactions

`fastsdpo prepare` (prepare.py) runs the first three steps over files of any size and writes interactions.
"""

from fastsdpo.data.filters import ConversationFilter as ConversationFilter
from fastsdpo.data.interactions import Conversation as Conversation
from fastsdpo.data.interactions import Interaction as Interaction
from fastsdpo.data.interactions import extract_interactions as extract_interactions
from fastsdpo.data.loading import LoadReport as LoadReport
from fastsdpo.data.loading import load_conversations as load_conversations
from fastsdpo.data.loading import load_interactions as load_interactions
from fastsdpo.data.readers.registry import RecordParser as RecordParser
from fastsdpo.data.templates import HindsightTemplate as HindsightTemplate
from fastsdpo.data.tokenization import InteractionTokenizer as InteractionTokenizer
from fastsdpo.data.tokenization import TokenizedInteraction as TokenizedInteraction
from fastsdpo.data.tokenization import tokenize_interaction as tokenize_interaction
from fastsdpo.data.tokenization import tokenize_interactions as tokenize_interactions
