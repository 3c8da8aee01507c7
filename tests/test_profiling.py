"""What `rvlm.profiling` says of memory; its clocks are tested where they are used."""

import pytest
import torch

from rvlm import profiling


def test_peak_is_the_most_at_one_time_beyond_what_was_there():
    held = torch.empty(1000, 1000)

    def work():
        first = torch.empty(1000, 500)
        second = held + 1  # 6 MB with the first
        del first, second
        return torch.empty(1000, 250)

    assert profiling.peak_bytes(work) == pytest.approx(6e6, rel=1e-3)
    assert profiling.peak_bytes(lambda: None) == 0
