"""The parameters of a layer, as a file has them -> what they change of one module.

Formulas are LyCORIS' for its kinds and PEFT's for LoRA and DoRA. Everything is computed here once, on the CPU in
float32; what the model's rows meet is small, and in the model's own format.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from pipelines.adapters.base_changes import (
    ButterflyLayer,
    DecomposedLayer,
    InputScaleLayer,
    OutputScaleLayer,
    RotationLayer,
)
from pipelines.adapters.fitting import fit_down, fit_up
from pipelines.adapters.layers import Layer
from pipelines.adapters.linear_changes import (
    BiasLayer,
    HadamardLayer,
    KroneckerLayer,
    LoraLayer,
    NormLayer,
    WeightLayer,
)
from pipelines.adapters.reading import Parameters
from pipelines.torch_compat import ran_out_of_memory

MOST_RANKS = 64
"""LoHa and LoKr of more ranks than this are not written out as low-rank pairs: their own form is cheaper (ADP-5)."""

NORMS = (nn.LayerNorm, nn.GroupNorm)
Plain = nn.Linear | nn.Conv2d


class MisfitError(ValueError):
    """Parameters whose shapes do not fit a module; the message says what it takes."""


def build(parameters: Parameters, module: nn.Module, name: str, config: Mapping[str, Any]) -> tuple[Layer, ...]:
    """What a file's parameters change of a module.

    Args:
        parameters: of one layer, complete.
        module: of the loaded model.
        name: the layer's, by which PEFT's configuration knows it.
        config: PEFT's configuration of the part.

    Raises:
        MisfitError: they belong to a module of another shape or kind.
    """
    try:
        return _build({key: tensor.float() for key, tensor in parameters.items()}, module, name, config)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # what torch raises about shapes it cannot join
        if isinstance(error, MisfitError) or ran_out_of_memory(error):
            raise
        raise MisfitError(f"factors of {_shape(module)}") from error


def _build(given: Parameters, module: nn.Module, name: str, config: Mapping[str, Any]) -> tuple[Layer, ...]:
    for key in ("alpha", "on_input"):
        if key in given and given[key].numel() != 1:
            raise MisfitError("an alpha that is one number")
    if "w_norm" in given or "b_norm" in given:
        return (_norm(given, module),)
    if isinstance(module, NORMS):
        return (_of_norm(given, module),)
    assert isinstance(module, Plain)
    makers = dict.fromkeys(make for mark, make in _BUILDERS.items() if mark in given)
    layers = [make(given, module, name, config) for make in makers]
    if "up_bias" in given:  # PEFT's lora_bias: scaled as the product is
        layers.append(_bias(given["up_bias"] * _scale(given, len(given["down"]), name, config), module))
    if "diff_b" in given:
        layers.append(_bias(given["diff_b"], module))
    return tuple(layers)


def _scale(given: Parameters, rank: int, name: str, config: Mapping[str, Any]) -> float:
    """Alpha / rank: alpha beside the layer (0 is none, as kohya and LyCORIS have it), else PEFT's, else the rank."""
    alpha = given["alpha"].item() if "alpha" in given else 0.0
    if alpha:
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if "lora_alpha" not in config and "alpha_pattern" not in config:
        return 1.0
    patterns = config.get("alpha_pattern") or {}
    own = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), None)
    alpha = config.get("lora_alpha", rank) if own is None else own
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _lora(given: Parameters, module: Plain, name: str, config: Mapping[str, Any]) -> Layer:
    down, up, rank = given["down"], given["up"], given["down"].shape[0]
    scale = _scale(given, rank, name, config)
    if "mid" in given:
        mid = given["mid"]
        if mid.ndim != 4 or mid.shape[1] != rank or down[0].numel() * rank != down.numel():
            raise MisfitError("a middle factor of its rank")
        down = torch.einsum("srhw,ri->sihw", mid, down.reshape(rank, -1))
    fitted = fit_down(down, module), fit_up(up, down.shape[0], module)
    if fitted[0] is None or fitted[1] is None:
        out, *inner = _shape(module)
        raise MisfitError(f"up [{out}, rank] and down {['rank', *inner]}".replace("'", ""))
    return _decomposed(LoraLayer(fitted[0], fitted[1], scale), given, module)


def _loha(given: Parameters, module: Plain, name: str, config: Mapping[str, Any]) -> Layer:
    rank = given["hada_w1_b"].shape[0]
    halves = [_half(given, "hada", side, module) for side in "12"]
    scale = _scale(given, rank, name, config)
    first, second = LoraLayer(*halves[0], scale), LoraLayer(*halves[1])
    layer: Layer = HadamardLayer(first, second)
    ranks = len(first.down) * len(second.down)
    if ranks <= MOST_RANKS:  # (sum a b) * (sum c d) = sum (a * c) (b * d)
        down = torch.einsum("r...,s...->rs...", first.down, second.down).flatten(0, 1)
        up = torch.einsum("or,os->ors", first.up.flatten(1), second.up.flatten(1)).flatten(1)
        layer = LoraLayer(down, up.view(*up.shape, *[1] * (down.ndim - 2)), scale)
    return _decomposed(layer, given, module)


def _half(given: Parameters, kind: str, side: str, module: Plain) -> tuple[torch.Tensor, torch.Tensor]:
    """Down and up of one of LoHa's two matrices, in the shapes of the module."""
    up, down = given[f"{kind}_w{side}_a"], given[f"{kind}_w{side}_b"]
    core = given.get(f"{kind}_t{side}")
    if core is not None:  # Tucker's form: core [s, r, k, k], up [s, out], down [r, in]
        if core.ndim != 4 or core.shape[:2] != (len(up), len(down)) or up.ndim != 2 or down.ndim != 2:
            raise MisfitError("a core of its factors' ranks")
        up, down = up.T, torch.einsum("srhw,ri->sihw", core, down)
    fitted = fit_down(down, module), fit_up(up, len(down), module)
    if fitted[0] is None or fitted[1] is None:
        out, *inner = _shape(module)
        raise MisfitError(f"w{side}_a [{out}, rank] and w{side}_b {['rank', *inner]}".replace("'", ""))
    return fitted[0], fitted[1]


def _lokr(given: Parameters, module: Plain, name: str, config: Mapping[str, Any]) -> Layer:
    """Alpha counts where one of the two is factored; the rank is the left one's, else the right one's."""
    rank = next((given[key].shape[0] for key in ("lokr_w1_b", "lokr_w2_b") if key in given), None)
    scale = 1.0 if rank is None else _scale(given, rank, name, config)
    out, inner, *kernel = _shape(module)
    left_up, left_down = _factors(given, "1", [])
    right_up, right_down = _factors(given, "2", kernel)
    (a, c), (b, d) = (left_up.shape[0], left_down.shape[1]), (right_up.shape[0], right_down.shape[1])
    if (a * b, c * d) != (out, inner) or list(right_down.shape[2:]) != kernel:
        raise MisfitError(f"factors whose product is {[out, inner, *kernel]}")
    ranks = len(left_down) * len(right_down)
    if ranks <= min(MOST_RANKS, out // 2) and "lokr_w2_b" in given:
        left = left_down.view(*left_down.shape, *[1] * len(kernel))
        up = torch.kron(left_up, right_up).reshape(out, ranks, *[1] * len(kernel))
        return _decomposed(LoraLayer(torch.kron(left, right_down), up, scale), given, module)
    right = torch.einsum("or,r...->o...", right_up, right_down)
    return _decomposed(KroneckerLayer(left_up @ left_down * scale, right), given, module)


def _factors(given: Parameters, side: str, kernel: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """One of LoKr's two matrices: up `[out, rank]` and down `[rank, in, *kernel]`; of a whole one, up is the unit."""
    whole = given.get(f"lokr_w{side}")
    if whole is not None:
        if whole.ndim < 2:
            raise MisfitError("factors that are matrices")
        whole = whole if kernel or whole.ndim == 2 else whole.flatten(1)
        if kernel and whole.ndim == 2:
            whole = whole.reshape(len(whole), -1, *kernel) if whole.shape[1] % math.prod(kernel) == 0 else whole
        return torch.eye(len(whole)), whole
    up, down = given[f"lokr_w{side}_a"], given[f"lokr_w{side}_b"]
    core = given.get(f"lokr_t{side}")
    if core is not None:
        if core.ndim != 2 + len(kernel) or core.shape[:2] != (len(up), len(down)) or up.ndim != 2 or down.ndim != 2:
            raise MisfitError("a core of its factors' ranks")
        return up.T.contiguous(), torch.einsum("sr...,ri->si...", core, down).contiguous()
    if up.ndim != 2 or up.shape[1] != len(down) or down[0].numel() % math.prod(kernel):
        raise MisfitError("factors of one rank")
    return up, down.reshape(len(down), -1, *kernel)


def _rotation(given: Parameters, module: Plain, name: str, config: Mapping[str, Any]) -> Layer:
    """LyCORIS' OFT (three dimensions) and BOFT (four); alpha is the largest norm of all blocks together, over out."""
    blocks, out = given["oft_blocks"], _shape(module)[0]
    sizes = blocks.shape
    fits = blocks.ndim in (3, 4) and sizes[-1] == sizes[-2] and sizes[-3] * sizes[-1] == out
    if not fits or (blocks.ndim == 4 and (sizes[-1] % 2 or out % (2 ** sizes[0] * (sizes[-1] // 2)))):
        raise MisfitError(f"blocks over {out} outputs")
    rescale = given["rescale"].flatten() if "rescale" in given else None
    if rescale is not None and len(rescale) != out:
        raise MisfitError(f"a scale for each of {out} outputs")
    skew = blocks - blocks.transpose(-1, -2)
    most = given["alpha"].item() * out if "alpha" in given else 0.0
    norm = skew.norm() + 1e-8
    if 0 < most < norm:
        skew = skew * (most / norm)
    unit = torch.eye(sizes[-1])
    turns = (unit + skew) @ torch.linalg.inv(unit - skew) - unit
    if not bool(turns.isfinite().all()):
        raise MisfitError("blocks that are rotations")
    if blocks.ndim == 4:
        return ButterflyLayer(turns, rescale)
    return RotationLayer(turns.transpose(-1, -2).contiguous(), rescale)  # LyCORIS turns columns here, rows in BOFT


def _ia3(given: Parameters, module: Plain, name: str, config: Mapping[str, Any]) -> Layer:
    out, inner, *_ = _shape(module)
    of_inputs, scale = bool(given["on_input"].item()), given["weight"].flatten()
    if len(scale) != (inner if of_inputs else out):
        raise MisfitError(f"a scale for each of {inner if of_inputs else out} channels")
    return InputScaleLayer(scale) if of_inputs else OutputScaleLayer(scale)


def _glora(given: Parameters, module: Plain, name: str, config: Mapping[str, Any]) -> Layer:
    """W a1 a2 + b1 b2 (Chavan et al. 2023, arXiv:2306.07967), with LyCORIS' scale."""
    out, inner, *kernel = _shape(module)
    a1, a2, b1 = (given[key].flatten(1) for key in ("a1", "a2", "b1"))
    rank = len(given["b2"])
    scale = _scale(given, len(a2), name, config)
    if a1.shape[0] != inner or a2.shape != (a1.shape[1], inner):
        raise MisfitError(f"a1 [{inner}, rank] and a2 [rank, {inner}]")
    b2 = given["b2"]
    if "bm" in given:
        if given["bm"].shape[:2] != (b1.shape[-1], rank):
            raise MisfitError("a middle factor of its rank")
        b2 = torch.einsum("srhw,ri->sihw", given["bm"], b2.reshape(rank, -1))
    down, up = fit_down(b2, module), fit_up(b1, len(b2), module)
    if down is None or up is None:
        raise MisfitError(f"b1 [{out}, rank] and b2 {['rank', inner, *kernel]}".replace("'", ""))
    base = module.get_parameter("weight").detach().cpu().float()
    through = torch.einsum("oi...,ij->oj...", base, a1)
    if math.prod(kernel) == 1:  # of two low-rank pairs, one
        units = [1] * len(kernel)
        down, up = torch.cat([a2.view(*a2.shape, *units), down]), torch.cat([through, up], 1)
        return LoraLayer(down, up, scale)
    product = torch.einsum("or,r...->o...", up.flatten(1), down)
    return WeightLayer((torch.einsum("oj...,ji->oi...", through, a2) + product) * scale)


def _difference(given: Parameters, module: Plain, name: str, config: Mapping[str, Any]) -> Layer:
    shape = _shape(module)
    if given["diff"].numel() != math.prod(shape) or given["diff"].shape[0] != shape[0]:
        raise MisfitError(f"a difference {shape}")
    return WeightLayer(given["diff"].reshape(shape))


def _bias(values: torch.Tensor, module: nn.Module) -> Layer:
    if values.numel() != _shape(module)[0]:
        raise MisfitError(f"a bias of {_shape(module)[0]} numbers")
    return BiasLayer(values.flatten())


def _norm(given: Parameters, module: nn.Module) -> Layer:
    """LyCORIS' difference of a normalisation's weight and bias."""
    shape = _shape(module) if isinstance(module, NORMS) else []
    values = [given.get(key) for key in ("w_norm", "b_norm")]
    if not shape or any(value is not None and list(value.shape) != shape for value in values):
        raise MisfitError(f"differences {shape}" if shape else "no difference of a normalisation")
    scale, shift = (torch.zeros(shape) if value is None else value for value in values)
    return NormLayer(scale, shift)


def _of_norm(given: Parameters, module: nn.Module) -> Layer:
    """The same, spelt as full differences of a weight and a bias are."""
    if unknown := set(given) - {"diff", "diff_b", "alpha"}:
        raise MisfitError(f"differences {_shape(module)}, no {sorted(unknown)[0]}")
    renamed = {"diff": "w_norm", "diff_b": "b_norm"}
    return _norm({renamed[key]: value for key, value in given.items() if key in renamed}, module)


def _decomposed(layer: Layer, given: Parameters, module: nn.Module) -> Layer:
    """A change and DoRA's magnitudes, where the layer has them: of outputs, or in early files of LyCORIS of inputs."""
    out, inner, *kernel = _shape(module)
    units = [1] * len(kernel)
    if "magnitude" in given:
        if given["magnitude"].numel() != out:
            raise MisfitError(f"magnitudes of {out} outputs")
        return DecomposedLayer.of(layer, module, given["magnitude"], of_inputs=False)
    if "dora_scale" not in given:
        return layer
    shape = list(given["dora_scale"].shape)
    if shape not in ([out], [out, 1], [out, 1, *units], [1, inner], [1, inner, *units]):
        raise MisfitError(f"magnitudes {[out, 1, *units]}")
    return DecomposedLayer.of(layer, module, given["dora_scale"], of_inputs=shape[0] == 1 and shape != [out])


def _shape(module: nn.Module) -> list[int]:
    return list(module.get_parameter("weight").shape)


_BUILDERS: dict[str, Callable[[Parameters, Plain, str, Mapping[str, Any]], Layer]] = {
    "down": _lora,
    "hada_w1_a": _loha,
    "lokr_w1": _lokr,
    "lokr_w1_a": _lokr,
    "oft_blocks": _rotation,
    "on_input": _ia3,
    "a1": _glora,
    "diff": _difference,
}
"""What marks a kind -> how its layer is made."""
