"""Conversations in, tokenized interactions out. Imports only the standard library.

    load_conversations -> ConversationFilter -> extract_interactions -> tokenize_interactions

`fastsdpo prepare` (prepare.py) runs the first three over files of any size and writes interactions.
"""

from fastsdpo.data.interactions import Conversation as Conversation
from fastsdpo.data.interactions import Interaction as Interaction
from fastsdpo.data.interactions import extract_interactions as extract_interactions
