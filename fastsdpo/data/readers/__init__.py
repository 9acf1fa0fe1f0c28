"""Readers of the layouts in which people keep conversations; `registry` has them all.

A reader has two functions: ``is_...`` tells by a record's keys whether the record has its layout, ``read_...``
yields the record's conversations. What a layout says beside the text becomes fields of the answers (answers.py).
Each branch of a tree becomes a conversation of the same name (trees.py). Logs of model calls are read by the
message formats of the APIs (calls.py).
"""
