"""These tests compile: not where the kernels are the interpreter's, or without Triton."""

import importlib.util
import os

compiled = os.environ.get("TRITON_INTERPRET", "0") == "0" and importlib.util.find_spec("triton")
collect_ignore_glob = [] if compiled else ["test_*.py"]
