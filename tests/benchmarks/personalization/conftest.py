"""The tiny model, tokenizer and trainer of tests/online."""

from tests.online.conftest import lab as lab
from tests.online.conftest import saved as saved
