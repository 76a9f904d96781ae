"""The losses of DPO's family by name, for scripts that take one by one word: `--preference.loss ipo`."""

from typing import Literal

from rljax.ops import preferences as p

_LOSSES = (p.sigmoid, p.hinge, p.ipo, p.robust, p.exo_pair, p.nca_pair, p.bco_pair, p.sppo_hard, p.apo_zero, p.apo_down)
_LOSSES += (p.discopop,)

PAIR_LOSSES: dict[str, p.PreferenceLoss] = {loss.__name__: loss for loss in _LOSSES}  # (Δ chosen, Δ rejected, β)
PairLoss = Literal[tuple(PAIR_LOSSES)]
