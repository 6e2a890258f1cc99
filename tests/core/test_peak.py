"""The measured peak is a positive figure and leaves the run's random numbers alone."""

import torch

from samtrain.core.peak import peak_tflops


def test_measuring_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    peak, source = peak_tflops(torch.device("cpu"), torch.float32)
    assert peak > 0 and "measured" in source
    assert torch.equal(torch.get_rng_state(), before)
