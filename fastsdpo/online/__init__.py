"""Learning while talking: sample answers, ask the user, train on the follow-ups. Names are imported at first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsdpo.online.config import OnlineSDPOConfig as OnlineSDPOConfig
    from fastsdpo.online.degeneration import CollapseDetector as CollapseDetector
    from fastsdpo.online.degeneration import degenerate as degenerate
    from fastsdpo.online.endpoint import ChatEndpoint as ChatEndpoint
    from fastsdpo.online.prompts import PromptDataset as PromptDataset
    from fastsdpo.online.trainer import OnlineSDPOTrainer as OnlineSDPOTrainer
    from fastsdpo.online.users import ConstantUser as ConstantUser
    from fastsdpo.online.users import EndpointUser as EndpointUser
    from fastsdpo.online.users import LanguageModelUser as LanguageModelUser
    from fastsdpo.online.users import RuleUser as RuleUser
    from fastsdpo.online.users import SwitchingUser as SwitchingUser
    from fastsdpo.online.users import TerminalUser as TerminalUser
    from fastsdpo.online.users import UnrelatedUser as UnrelatedUser
    from fastsdpo.online.users import UserSimulator as UserSimulator

_MODULE_OF = {
    "ChatEndpoint": "endpoint",
    "CollapseDetector": "degeneration",
    "ConstantUser": "users",
    "EndpointUser": "users",
    "LanguageModelUser": "users",
    "OnlineSDPOConfig": "config",
    "OnlineSDPOTrainer": "trainer",
    "PromptDataset": "prompts",
    "RuleUser": "users",
    "SwitchingUser": "users",
    "TerminalUser": "users",
    "UnrelatedUser": "users",
    "UserSimulator": "users",
    "degenerate": "degeneration",
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fastsdpo.online' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
