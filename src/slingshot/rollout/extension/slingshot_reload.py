"""What `slingshot rollout-server` adds to vLLM's workers, in vLLM's own environment: it imports nothing of slingshot.

    python -m vllm.entrypoints.openai.api_server --worker-extension-cls slingshot_reload.SlingshotReload ...

with this file's folder in PYTHONPATH; its methods are then called by POST /collective_rpc.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

STABLE = "STABLE"  # the file that says of a folder of weights that it is whole, and which version they are


class SlingshotReload:
    """Mixed into vLLM's worker, whose `vllm_config`, `model_runner` and `reload_weights` these methods use."""

    vllm_config: Any
    model_runner: Any
    reload_weights: Any

    def slingshot_describe(self) -> dict[str, Any]:
        """What is served and how: hf_config's plain values, dtype, which logprobs are told, whether experts are."""
        model = self.vllm_config.model_config
        plain = {name: each for name, each in model.hf_config.to_dict().items() if isinstance(each, int | float | str)}
        return {
            "config": plain,
            "dtype": str(model.dtype).removeprefix("torch."),
            "logprobs_mode": str(model.logprobs_mode),
            "routed_experts": bool(self.vllm_config.aux_output_config.enable_return_routed_experts),
        }

    def slingshot_reload(self, folder: str, version: str) -> dict[str, Any]:
        """Load a folder's weights in place of the present ones. Returns {"version"} of what was loaded, or {"error"}.

        Where vLLM runs on a CPU its own reload leaves two things as they were, and says nothing: a MoE layer packs its
        experts only while it has no kernel, so unpacked ones would be copied into packed storage; and an embedding or a
        head keeps a packed copy of its matrix, which nobody renews where the head is the embedding.
        """
        stable = Path(folder) / STABLE
        if not stable.is_file():
            return {"error": f"{folder} is not to be seen there, or not whole"}
        if (found := stable.read_text(encoding="utf-8").strip()) != version:
            return {"error": f"{folder} holds the weights {found}, not {version}"}
        model, on_cpu = self.model_runner.get_model(), self.vllm_config.device_config.device_type == "cpu"
        if on_cpu:
            for module in model.modules():
                method: Any = getattr(module, "quant_method", None)
                if getattr(method, "moe_kernel", None) is not None:
                    method.moe_kernel = None
        try:
            self.reload_weights(weights_path=folder)
        except Exception as error:  # whoever asked learns why: vLLM's answer would be a bare 500
            return {"error": f"{type(error).__name__}: {error}"}
        if on_cpu:
            _pack_embeddings(model)
        return {"version": found}


def _pack_embeddings(model: Any) -> None:
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
