"""Models and GPUs by name, from their public configurations and data sheets (sources in docs/plan.md)."""

from __future__ import annotations

from typing import Any

__all__ = ["GPUS", "MODELS"]


def model(layers: int, experts: int, top_k: int, width: int, expert_hidden: int, *, dense: float, attention: int,
          **more: Any) -> dict[str, Any]:  # fmt: skip
    return {"layers": layers, "experts": experts, "top_k": top_k, "width": width, "expert_hidden": expert_hidden,
            "dense_parameters": dense, "attention_width": attention, **more}  # fmt: skip


# dense: attention, routers, shared experts, dense layers and the output head, without the input embedding
MODELS: dict[str, dict[str, Any]] = {
    "deepseek-v3": model(58, 256, 8, 7168, 2048, dense=16.2e9, attention=20480, gpus=2048, ep=64),
    "gpt-oss-120b": model(36, 128, 4, 2880, 2880, dense=1.55e9, attention=4096),
    "kimi-k2": model(60, 384, 8, 7168, 2048, dense=10.55e9, attention=10240, gpus=1024, ep=16),
    "lab": model(2, 8, 2, 64, 64, dense=0.165e6, attention=64, tokens=256, sequence=256, micro_batches=4),
    "mixtral-8x7b": model(32, 8, 2, 4096, 14336, dense=1.474e9, attention=4096),
    "olmoe-1b-7b": model(16, 64, 8, 2048, 1024, dense=0.373e9, attention=2048),
    "qwen3-30b-a3b": model(48, 128, 8, 2048, 768, dense=1.23e9, attention=4096),
    "qwen3-235b-a22b": model(94, 128, 8, 4096, 1536, dense=7.37e9, attention=8192, gpus=256, ep=16),
}

GPUS: dict[str, dict[str, Any]] = {
    "a100": {"tflops": 312.0, "intra_gb_s": 300.0, "inter_gb_s": 25.0},
    "h100": {"tflops": 989.0, "intra_gb_s": 450.0, "inter_gb_s": 50.0},
    "h800": {"tflops": 989.0, "intra_gb_s": 200.0, "inter_gb_s": 50.0},
    "b200": {"tflops": 2250.0, "intra_gb_s": 900.0, "inter_gb_s": 50.0},
}
