"""Running pass rates of prompts, and which prompts a draw leaves out by them.

A group whose completions all pass or all fail teaches nothing: prompts that a policy always or never solves cost only
samples. The state is two arrays, so a checkpoint holds it.
"""

from typing import NamedTuple

import numpy as np

NEVER = -1  # the epoch of a prompt that has not been drawn


class PassRates(NamedTuple):
    """What is known of each of the N prompts."""

    rate: np.ndarray  # [N] float32: share of completions that pass, the last draw counting half
    epoch: np.ndarray  # [N] int32: in which it was drawn last


def initial_pass_rates(size: int) -> PassRates:
    """Nothing is known yet."""
    return PassRates(np.zeros(size, np.float32), np.full(size, NEVER, np.int32))


def update_pass_rates(rates: PassRates, indices: np.ndarray, epochs: np.ndarray, passed: np.ndarray) -> PassRates:
    """The rates after these prompts [P] were drawn in these epochs, and the share `passed` [P] of completions passed.

    NaN in `passed`, where nothing was judged, leaves a rate as it was. A rate begins as the first share.
    """
    rate = np.array(rates.rate)
    epoch = np.array(rates.epoch)
    for i, drawn_in, share in zip(indices, epochs, passed, strict=True):
        if np.isnan(share):
            continue
        rate[i] = share if epoch[i] == NEVER else (rate[i] + share) / 2
        epoch[i] = drawn_in
    return PassRates(rate, epoch)


def is_left_out(
    rates: PassRates, indices: np.ndarray, epochs: np.ndarray, lowest: float, highest: float, skip_epochs: int
) -> np.ndarray:
    """True where a prompt's rate is below `lowest` or above `highest`; it is drawn again after `skip_epochs` epochs."""
    rate = np.asarray(rates.rate)[indices]
    measured = np.asarray(rates.epoch)[indices]
    outside = (rate < lowest) | (rate > highest)
    return outside & (measured != NEVER) & (epochs - measured <= skip_epochs)
