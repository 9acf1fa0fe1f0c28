"""Readers of the layouts in which people keep conversations; `registry` has them all.

A reader is two functions: whether a record is of its layout, by its keys, and the record's conversations.
What a layout says beside the text becomes fields of the answers (answers.py); a branch is a conversation of
the same name (trees.py); a log of calls goes through the shapes of the APIs (calls.py).
"""
