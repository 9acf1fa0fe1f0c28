"""Shared test setup: two threads at most, and every result must be fully written.

With deterministic algorithms on, `torch.empty` is filled with NaN, so a kernel that leaves an
element unwritten fails its comparison instead of passing by luck.
"""

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)
