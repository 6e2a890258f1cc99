import torch

from samtrain.core.precision import exact_float32


def test_float32_is_exact_in_matmuls_and_convolutions() -> None:
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = True
        exact_float32()
        assert [switch.allow_tf32 for switch in switches] == [False, False]
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
