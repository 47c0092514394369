"""How quantised matrices lie in a checkpoint: what stands beside them, under which names. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FP8_BLOCK = 128  # DeepSeek-V3's weight_block_size, both ways
PACKED, PACKED_SCALE, PACKED_SHAPE = "_packed", "_scale", "_shape"  # appended to the name of an int8 or int4 matrix
PACKED_FORMAT = "pack-quantized"
LEFT_ALONE = ("lm_head", "re:.*mlp.gate$", "re:.*kv_b_proj$", "re:.*eh_proj$", "re:.*shared_head.head$")  # modules
BITS = {"int8": 8, "int4": 4}
SCALE = "_scale_inv"  # appended to the name of an FP8 matrix; despite its name the number multiplies


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the block scales of an FP8 matrix [out, in]; blocks at the edges may be partly filled."""
    rows, columns = shape
    return -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)


def packed_shapes(shape: tuple[int, ...], bits: int, group: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What stands in place of a matrix NAME [out, in] of so many bits: after NAME, safetensors' type and the shape.

    The type "" is the checkpoint's own. These are compressed-tensors' names for its format `pack-quantized`.
    """
    rows, columns = shape
    words = -(-columns * bits // 32)
    return {PACKED: ("I32", (rows, words)), PACKED_SCALE: ("", (rows, columns // group)), PACKED_SHAPE: ("I64", (2,))}


def is_packed(name: str, stored: str) -> bool:
    """Whether int8 and int4 checkpoints written here pack this matrix (Spec.stored "linear").

    Not MLA's kv_b_proj, which engines take apart and absorb into queries and outputs.
    """
    return stored == "linear" and not name.endswith("kv_b_proj.weight")


def packing_config(bits: int, group: int) -> dict[str, Any]:
    """config.json's quantization_config for int8 or int4 matrices, in compressed-tensors' words."""
    weights = {
        "num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group, "dynamic": False,
        "block_structure": None, "actorder": None, "observer": "minmax", "observer_kwargs": {},
    }  # fmt: skip
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": PACKED_FORMAT, "quantization_status": "compressed",
        "config_groups": {"group_0": scheme | {"format": PACKED_FORMAT}}, "ignore": list(LEFT_ALONE),
        "kv_cache_scheme": None, "global_compression_ratio": None, "sparsity_config": {}, "transform_config": {},
    }  # fmt: skip


def read_packing_config(table: Mapping[str, Any]) -> tuple[int, int] | str:
    """Bits and group size that a compressed-tensors quantization_config tells of, or what of it is not read here."""
    kind, groups = table.get("format"), table.get("config_groups")
    if kind != PACKED_FORMAT or not isinstance(groups, Mapping) or len(groups) != 1:
        return f"format {kind!r:.40} with {len(groups) if isinstance(groups, Mapping) else 'no'} config_groups"
    (scheme,) = groups.values()
    weights = scheme.get("weights") if isinstance(scheme, Mapping) else None
    if not isinstance(weights, Mapping):
        return "config_groups without weights"
    for where, given, wanted in (
        (scheme, "input_activations", (None,)), (scheme, "output_activations", (None,)), (weights, "type", ("int",)),
        (weights, "symmetric", (True,)), (weights, "strategy", ("group",)), (weights, "dynamic", (False, None)),
        (weights, "actorder", (None,)), (weights, "num_bits", tuple(BITS.values())),
        (table, "kv_cache_scheme", (None,)),
    ):  # fmt: skip
        if where.get(given) not in wanted:
            return f"{given} {where.get(given)!r:.40}"
    group = weights.get("group_size")
    return (weights["num_bits"], group) if type(group) is int and 0 < group <= 1024 else f"group_size {group!r:.40}"
