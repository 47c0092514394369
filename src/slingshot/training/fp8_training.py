"""Training in FP8: which matrices multiply in it (arXiv 2412.19437, 3.3.1). What is trained, and stored, stays float32.

train_in_fp8(model, config.fp8)          # "block", "tensor" or None; sharded or not
"""

from __future__ import annotations

from slingshot.checkpoint.layout import layout, place
from slingshot.model.linear import GroupedLinear, Linear
from slingshot.model.transformer import Transformer
from slingshot.quantization.fp8_product import FP8Scaling


def train_in_fp8(model: Transformer, scaling: FP8Scaling | None) -> None:
    """The matrices that a released FP8 checkpoint keeps in e4m3: those of attention, MLPs and experts.

    Embedding, head, routers, norms, attention itself and what joins the MTP module's inputs are left as they are.
    """
    for where in {place(spec.name)[0] for spec in layout(model.config) if spec.stored == "linear"}:
        module = model.get_submodule(where.removesuffix(".weight"))
        assert isinstance(module, Linear | GroupedLinear)
        module.fp8 = scaling
