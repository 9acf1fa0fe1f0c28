"""Learning while talking: sample answers, ask the user, train on the follow-ups."""

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
