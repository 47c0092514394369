"""Which dtype activations and matrix products run in. Parameters and optimizer state stay float32; `Linear` casts as it multiplies."""

from __future__ import annotations

from typing import Literal

import torch

from slingshot.machine.device import auto_dtype, machine_peak

Dtype = Literal["auto", "float32", "bfloat16"]


def compute_dtype(dtype: Dtype) -> torch.dtype:
    """The torch dtype; "auto" is what this machine multiplies fastest."""
    return auto_dtype() if dtype == "auto" else {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def peak(dtype: Dtype) -> float:
    """Measured matrix peak of this machine in the dtype, FLOP/s: the denominator of MFU."""
    return machine_peak(compute_dtype(dtype))
