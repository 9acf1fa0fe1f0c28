"""Learning while talking: sample answers, ask the user, train on the follow-ups. Names are imported at first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastsdpo.lazy import lazy_names

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
    "ChatEndpoint": "fastsdpo.online.endpoint",
    "CollapseDetector": "fastsdpo.online.degeneration",
    "ConstantUser": "fastsdpo.online.users",
    "EndpointUser": "fastsdpo.online.users",
    "LanguageModelUser": "fastsdpo.online.users",
    "OnlineSDPOConfig": "fastsdpo.online.config",
    "OnlineSDPOTrainer": "fastsdpo.online.trainer",
    "PromptDataset": "fastsdpo.online.prompts",
    "RuleUser": "fastsdpo.online.users",
    "SwitchingUser": "fastsdpo.online.users",
    "TerminalUser": "fastsdpo.online.users",
    "UnrelatedUser": "fastsdpo.online.users",
    "UserSimulator": "fastsdpo.online.users",
    "degenerate": "fastsdpo.online.degeneration",
}
__all__ = list(_MODULE_OF)
__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
