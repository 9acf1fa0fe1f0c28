"""`fastsdpo prepare --schema`: what it writes fits, and what training could not read does not."""

import json

import pytest

from fastsdpo.commands.prepare import main
from fastsdpo.data.layouts import parse_interaction

MESSAGES = [{"role": role, "content": text} for role, text in (("system", "s"), ("user", "q"), ("assistant", "y"))]
RECORDS = [{"messages": [*MESSAGES, *MESSAGES[1:], MESSAGES[1]]}]
CHANGES = [
    ({"prompt": []}, False),
    ({"prompt": MESSAGES[:1]}, False),
    ({"prompt": [{"role": "user", "content": None}]}, False),
    ({"prompt": [{"role": "tool", "content": "{}"}]}, False),
    ({"completion": "text"}, False),
    ({"completion": [MESSAGES[2]]}, True),
    ({"completion": [MESSAGES[2]] * 2}, False),
    ({"completion": {"role": "user", "content": ""}}, False),
    ({"user_response": {"role": "user"}}, False),
    ({"turn_id": "0"}, False),
    ({"id": None}, False),
    ({"rating": 1, "model": "m"}, True),
]


def test_the_schema(prepared, capsys):
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    rows, of_trl = (prepared(RECORDS, "--layout", layout, "--overwrite").rows for layout in ("fastsdpo", "trl"))
    with pytest.raises(SystemExit) as ended:
        main(["--schema"])
    schema = json.loads(capsys.readouterr().out)
    assert ended.value.code in (0, None)
    validator.check_schema(schema)
    fits = validator(schema).is_valid
    assert len(rows) == 2 and all(fits(row) and list(row) == schema["required"] for row in rows + of_trl)
    for change, is_fit in CHANGES:
        assert fits({**rows[0], **change}) == is_fit, change
        if is_fit:
            parse_interaction({**rows[0], **change})
    for name in schema["required"]:
        assert not fits({key: value for key, value in rows[0].items() if key != name})
