"""`fastsdpo signal`: the token-level signal of an interaction, looked at.

`compute_signal` computes it, `render_terminal`, `render_html` and `render_png` show it.
"""

from fastsdpo.signal.compute import NEUTRAL_FOLLOWUP as NEUTRAL_FOLLOWUP
from fastsdpo.signal.compute import FollowupSignal as FollowupSignal
from fastsdpo.signal.compute import SignalResult as SignalResult
from fastsdpo.signal.compute import choose_unrelated as choose_unrelated
from fastsdpo.signal.compute import compute_signal as compute_signal
from fastsdpo.signal.figure import render_png as render_png
from fastsdpo.signal.page import render_html as render_html
from fastsdpo.signal.terminal import color_depth as color_depth
from fastsdpo.signal.terminal import render_terminal as render_terminal
