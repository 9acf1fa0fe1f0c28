"""Computes and shows the token-level signal of an interaction; the command is `fastsdpo signal`.

`compute_signal` computes it, `render_terminal` and `render_html` show it.
"""

from fastsdpo.signal.compute import NEUTRAL_FOLLOWUP as NEUTRAL_FOLLOWUP
from fastsdpo.signal.compute import FollowupSignal as FollowupSignal
from fastsdpo.signal.compute import SignalResult as SignalResult
from fastsdpo.signal.compute import choose_unrelated as choose_unrelated
from fastsdpo.signal.compute import compute_signal as compute_signal
from fastsdpo.signal.page import render_html as render_html
from fastsdpo.signal.terminal import color_depth as color_depth
from fastsdpo.signal.terminal import render_answer as render_answer
from fastsdpo.signal.terminal import render_legend as render_legend
from fastsdpo.signal.terminal import render_terminal as render_terminal
