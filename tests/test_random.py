"""fastguard._random: the states of all random number generators."""

import io
import random

import numpy
import torch

from fastguard._random import random_state, set_random_state

CPU = torch.device("cpu")


def draws():
    return random.random(), numpy.random.standard_normal(3).tolist(), torch.randn(3).tolist()


def test_restored_generators_draw_the_same_numbers():
    for device in (None, CPU):
        draws()
        numpy.random.standard_normal()  # an odd number of normals: one is kept for the next call
        state = random_state(device)
        expected = draws()
        assert draws() != expected
        set_random_state(state, device)
        assert draws() == expected


def test_a_state_is_loaded_with_weights_only():
    state, file = random_state(CPU), io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    expected = draws()
    set_random_state(loaded, CPU)
    assert draws() == expected
