"""The row format as a JSON Schema: a line of the files that `prepare` writes and training reads."""

from __future__ import annotations

from typing import Any


def _message(roles: list[str], description: str) -> dict[str, Any]:
    return {
        "type": "object",
        "description": description,
        "properties": {"role": {"enum": roles}, "content": {"type": "string"}},
        "required": ["role", "content"],
        "additionalProperties": False,
    }


_ANSWER = _message(["assistant"], "The model's answer.")
ROW_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "fastsdpo interaction",
    "description": "One answer of a model and the user's reaction to it; one line of a JSON Lines file in UTF-8.",
    "type": "object",
    "properties": {
        "id": {"type": "string", "description": "Names the interaction; unique in the files of a run."},
        "conversation_id": {
            "type": "string",
            "description": "Interactions of one conversation share it, and follow each other in the file.",
        },
        "turn_id": {"type": "integer", "minimum": 0, "description": "Counts the answers of a conversation from 0."},
        "prompt": {
            "type": "array",
            "description": "Everything the model saw before its answer; the last message is a user's.",
            "items": _message(["system", "user", "assistant"], "A message of the history."),
            "minItems": 1,
            "contains": {"properties": {"role": {"const": "user"}}},
        },
        "completion": {
            "description": "The model's answer; in a list with `--layout trl`.",
            "anyOf": [_ANSWER, {"type": "array", "items": _ANSWER, "minItems": 1, "maxItems": 1}],
        },
        "user_response": _message(["user"], "What the user said next."),
    },
    "required": ["id", "conversation_id", "turn_id", "prompt", "completion", "user_response"],
    # Fields of the record that were kept, such as the model's name or a rating; training reads none of them.
    "additionalProperties": True,
}
