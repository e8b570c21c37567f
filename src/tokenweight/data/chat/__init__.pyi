from .conversation import CHAT_COLUMNS as CHAT_COLUMNS
from .conversation import chat_columns as chat_columns
from .conversation import conversation_text as conversation_text
from .render import chat_tokens as chat_tokens
from .sequences import ChatCutter as ChatCutter
