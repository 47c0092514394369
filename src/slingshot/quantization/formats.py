"""How quantised matrices lie in a checkpoint: what stands beside them, under which names. No torch.

    scheme = Scheme("int4", 32, wide=("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.experts."))
    scheme.bits("model.layers.1.mlp.experts.7.up_proj.weight")            # 8: wider than the others
    scheme.parts("model.layers.0.mlp.up_proj.weight", (96, 64))           # {"_packed": ("I32", (96, 8)), ...}
    Scheme.read(scheme.config()) == scheme                                # config.json's quantization_config

Names and layouts are compressed-tensors': `pack-quantized` (int8, int4), `int-quantized` with activations of 8 bits
too, a scale for each token (int8-dynamic), and `mxfp4-pack-quantized`, OCP's microscaling format (mxfp4). fp8 is
DeepSeek's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

FP8_BLOCK = 128  # DeepSeek-V3's weight_block_size, both ways
MX_BLOCK = 32  # OCP Microscaling Formats 1.0, 5.2: elements that share a scale
PACKED, PACKED_SCALE, PACKED_SHAPE = "_packed", "_scale", "_shape"  # appended to the name of a matrix of few bits
LEFT_ALONE = ("lm_head", "re:.*mlp.gate$", "re:.*kv_b_proj$", "re:.*eh_proj$", "re:.*shared_head.head$")  # modules
BITS = {"int8": 8, "int4": 4}  # weights alone, a scale for every group
SCALE = "_scale_inv"  # appended to the name of an FP8 matrix; despite its name the number multiplies

SchemeKind = Literal["int8", "int4", "int8-dynamic", "mxfp4"]
_FORMATS = {
    "int8": "pack-quantized", "int4": "pack-quantized", "int8-dynamic": "int-quantized",
    "mxfp4": "mxfp4-pack-quantized",
}  # fmt: skip


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the block scales of an FP8 matrix [out, in]; blocks at the edges may be partly filled."""
    rows, columns = shape
    return -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)


def is_packed(name: str, stored: str) -> bool:
    """Whether checkpoints of few bits written here pack this matrix (Spec.stored "linear").

    Not MLA's kv_b_proj, which engines take apart and absorb into queries and outputs.
    """
    return stored == "linear" and not name.endswith("kv_b_proj.weight")


@dataclass(frozen=True)
class Scheme:
    """What the matrices of a compressed-tensors checkpoint are.

    group       neighbours of a row that share a scale: of int8 and int4; 32 of mxfp4, 0 (the row) of int8-dynamic
    wide        of int4: modules that have 8 bits instead; a name that ends in a dot stands for all within
    """

    kind: SchemeKind
    group: int = 0
    wide: tuple[str, ...] = ()

    def bits(self, name: str) -> int:
        """Of the numbers of this matrix, given with its `.weight`."""
        module = name.removesuffix(".weight")
        wide = any(module == each or (each.endswith(".") and module.startswith(each)) for each in self.wide)
        return 4 if self.kind in ("int4", "mxfp4") and not wide else 8

    def parts(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What stands in place of a matrix NAME [out, in]: after NAME, safetensors' type and the shape.

        The type "" is the checkpoint's own.
        """
        rows, columns = shape
        if self.kind == "int8-dynamic":
            return {"": ("I8", shape), PACKED_SCALE: ("F32", (rows, 1))}
        if self.kind == "mxfp4":
            return {PACKED: ("U8", (rows, columns // 2)), PACKED_SCALE: ("U8", (rows, columns // MX_BLOCK))}
        words, groups = -(-columns * self.bits(name) // 32), columns // self.group
        return {PACKED: ("I32", (rows, words)), PACKED_SCALE: ("", (rows, groups)), PACKED_SHAPE: ("I64", (2,))}

    def config(self) -> dict[str, Any]:
        """config.json's quantization_config."""
        kind, form = self.kind, _FORMATS[self.kind]
        weights = _NUMBERS | {"num_bits": self.bits(""), "strategy": "group", "group_size": self.group}
        scheme = {"weights": weights, "input_activations": None, "output_activations": None, "format": form}
        if kind == "int8-dynamic":
            scheme["weights"] = weights | {"strategy": "channel", "group_size": None}
            scheme["input_activations"] = _NUMBERS | {"num_bits": 8, "strategy": "token", "dynamic": True}
        elif kind == "mxfp4":
            scheme["weights"] = weights | {"type": "float", "scale_dtype": "torch.uint8"}
        groups = {"group_0": {"targets": ["Linear"]} | scheme}
        if self.wide:
            targets = [each if not each.endswith(".") else f"re:{re.escape(each)}.*" for each in self.wide]
            groups["group_1"] = {"targets": targets} | scheme | {"weights": weights | {"num_bits": 8}}
        return {
            "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
            "config_groups": groups, "ignore": list(LEFT_ALONE), "kv_cache_scheme": None,
            "global_compression_ratio": None, "sparsity_config": {}, "transform_config": {},
        }  # fmt: skip

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> Scheme | str:
        """What a compressed-tensors quantization_config tells of, or what of it is not read here."""
        form, groups = table.get("format"), table.get("config_groups")
        if not isinstance(groups, Mapping) or not 1 <= len(groups) <= 2 or form not in _FORMATS.values():
            return f"format {form!r:.40} with {len(groups) if isinstance(groups, Mapping) else 'no'} config_groups"
        if table.get("kv_cache_scheme") is not None:
            return f"kv_cache_scheme {table['kv_cache_scheme']!r:.40}"
        found: list[tuple[Scheme, list[str]]] = []
        for group in groups.values():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if not isinstance(weights, Mapping):
                return "config_groups without weights"
            kinds = [kind for kind, its in _FORMATS.items() if its == form]
            kind = next((each for each in kinds if BITS.get(each) == weights.get("num_bits")), kinds[0])
            size = {"int8-dynamic": 0, "mxfp4": MX_BLOCK}.get(kind, weights.get("group_size"))
            if type(size) is not int or not 0 <= size <= 1024 or (size == 0 and kind in BITS):
                return f"group_size {size!r:.40}"
            scheme = cls(kind, size)  # type: ignore[arg-type]  # a key of _FORMATS
            if (other := next(_others(scheme, group), None)) is not None:
                return other
            found.append((scheme, group.get("targets") or []))
        return found[0][0] if len(found) == 1 else _joined(found)


# The keys of a scheme's weights or activations that change what they stand for, at the values that most have.
_NUMBERS: dict[str, Any] = {
    "type": "int", "symmetric": True, "dynamic": False, "actorder": None, "block_structure": None,
    "observer": "minmax", "observer_kwargs": {},
}  # fmt: skip
_SAME = {"dynamic": (None,), "actorder": ("weight", "static")}  # say how numbers were found, not what they stand for
_TOLD = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "actorder", "block_structure")


def _others(scheme: Scheme, group: Mapping[str, Any]) -> Iterator[str]:
    """What a group of config_groups has otherwise than it would be written."""
    written = scheme.config()["config_groups"]["group_0"]
    for part in ("weights", "input_activations", "output_activations"):
        wanted, given = written[part], group.get(part)
        if wanted is None or not isinstance(given, Mapping):
            if wanted != given:
                yield f"{part} {given!r:.40}"
            continue
        for key in _TOLD:
            same = (wanted.get(key), *_SAME.get(key, ()))
            if given.get(key, _NUMBERS.get(key)) not in same:
                yield f"{key} {given.get(key)!r:.40}"


def _joined(found: list[tuple[Scheme, list[str]]]) -> Scheme | str:
    """int4 for all, and int8 for those that are named."""
    (narrow, all_of), (wide, named) = sorted(found, key=lambda each: each[0].kind)
    if (narrow.kind, wide.kind) != ("int4", "int8") or all_of != ["Linear"] or narrow.group != wide.group:
        return "config_groups other than int4 for Linear and int8 for named modules, in groups of one size"
    names = [_named(target) for target in named]
    if None in names:
        return f"target {named[names.index(None)]!r:.60}"
    return Scheme("int4", narrow.group, tuple(name for name in names if name is not None))


def _named(target: Any) -> str | None:
    """A module, or with a dot at the end all within one, as `Scheme.wide` has them; None for other patterns."""
    if not isinstance(target, str) or re.fullmatch(r"(\w+\.)*\w+", target):
        return target if isinstance(target, str) else None
    within = re.fullmatch(r"re:((\w+\\\.)+)\.\*", target)
    return within[1].replace("\\", "") if within else None
