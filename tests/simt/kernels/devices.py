"""The devices that the operators' tests run on, as parameters of pytest."""

import pytest

from .ops import Device

DEVICES = [
    pytest.param(Device(), id="cuda kernel, lanes in turn"),
    pytest.param(Device(schedule="greedy", weak_memory=True, vary=True), id="warps one by one"),
    pytest.param(
        Device(schedule="random", weak_memory=True, resident=8, block_races=True, vary=True),
        id="at random",
    ),
]


def on_devices(name):
    """The function of one operator on each device, as parameters of a test."""
    return [
        pytest.param(getattr(device.values[0], name), id=f"{name} {device.id}")
        for device in DEVICES
    ]
