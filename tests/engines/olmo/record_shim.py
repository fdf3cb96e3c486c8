"""What OLMo-core's MoE needs on a CPU: its gather and scatter are Triton kernels behind an autotuner.

``TRITON_INTERPRET=1`` runs the kernels on CPU tensors. The autotuner asks Triton's driver to time configurations, and
without a GPU there is no driver: this one finds all equally fast. Nothing of OLMo-core is changed.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch


class Driver:
    """As much of a driver as the autotuner asks for."""

    def get_benchmarker(self):
        return lambda call, quantiles=(0.5,), **_: [0.0] * len(quantiles)

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 80, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def install() -> None:
    from triton.runtime import driver

    driver.set_active(Driver())
