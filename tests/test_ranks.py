"""How the processes of a job find their devices; what they do together is tested where it is done."""

import pytest
import torch
from torch import distributed

from rvlm.ranks import joined


@pytest.mark.parametrize("devices, backend, mine", [
    (0, "gloo", []), (1, "gloo", [0]), (2, "gloo", [1]), (4, "cpu:gloo,cuda:nccl", [3]), (8, "cpu:gloo,cuda:nccl", [3]),
])  # fmt: skip
def test_processes_that_share_a_device_do_without_nccl(devices, backend, mine, monkeypatch):
    for name, value in {"WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4, "LOCAL_RANK": 3}.items():
        monkeypatch.setenv(name, str(value))
    seen, began = [], []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setattr(distributed, "init_process_group", began.append)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: began.append("ended"))
    with joined():
        pass
    assert began == [backend, "ended"] and seen == mine
