"""The live reference: the models of `transformers` with a backbone's parameters and the authors' position grid."""

from types import MethodType

import numpy as np
import torch
from flax import nnx
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
)

from jaxla.models.backbones.vision_transformer import Variant, VisionTransformer

# names of DINOv2's attention layers in `transformers` 5.24 -> in 5.17
EARLIER_NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


def live_model(vit: VisionTransformer, authors_grid: bool = True) -> PreTrainedModel:
    """Return the model of `transformers` with the same dimensions and parameters, in float32.

    Args:
        authors_grid: resize DINOv2's learned positions as its authors do, not as `transformers` does.
    """
    parameters = {
        ".".join(map(str, path)): np.asarray(variable.get_value())
        for path, variable in nnx.to_flat_state(nnx.state(vit))
    }
    with torch.device("meta"):  # skips the random initialisation
        model = (_dinov2(vit.variant) if vit.variant.grid else _dinov3(vit.variant, parameters)).eval()
    model.load_state_dict(live_state(vit.variant, parameters, model), assign=True)
    if not vit.variant.grid:
        # use the checkpoint's periods, which may be rounded, instead of the formula
        model.rope_embeddings.inv_freq = 1 / torch.tensor(parameters["periods"])
    elif authors_grid:
        registers = vit.variant.antialias
        model.embeddings.interpolate_pos_encoding = MethodType(_authors_positions(registers), model.embeddings)
    return model


def live_tokens(model: PreTrainedModel, images: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return all tokens [B, 1 + R + h·w, C] of images [B, H, W, 3]: after the final norm, and after each block."""
    channels_first = torch.tensor(images.transpose(0, 3, 1, 2), dtype=next(model.parameters()).dtype)
    with torch.inference_mode():
        out = model(channels_first, output_hidden_states=True)
    return out.last_hidden_state.numpy(), [tokens.numpy() for tokens in out.hidden_states[1:]]


def authors_resize(grid: torch.Tensor, h: int, w: int, registers: bool) -> torch.Tensor:
    """Resize DINOv2's position grid [1, C, G, G] to h × w patches, with the arguments of its authors' code."""
    side = grid.shape[-1]
    scale = {"size": (h, w)} if registers else {"scale_factor": ((h + 0.1) / side, (w + 0.1) / side)}
    return torch.nn.functional.interpolate(grid, mode="bicubic", antialias=registers, **scale)


def _authors_positions(registers: bool):
    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        learned, side = self.position_embeddings, int((self.position_embeddings.shape[1] - 1) ** 0.5)
        h, w = height // self.patch_size, width // self.patch_size
        if (h, w) == (side, side):
            return learned
        grid = learned[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        resized = authors_resize(grid.float(), h, w, registers)  # the authors always resize in float32
        return torch.cat([learned[:, :1], resized.permute(0, 2, 3, 1).flatten(1, 2).to(learned.dtype)], dim=1)

    return interpolate_pos_encoding


def _dinov2(variant: Variant) -> PreTrainedModel:
    sizes = {
        "hidden_size": variant.width,
        "num_hidden_layers": variant.depth,
        "num_attention_heads": variant.heads,
        "mlp_ratio": 4,
        "patch_size": variant.patch,
        "image_size": variant.grid * variant.patch,
        "layer_norm_eps": variant.epsilon,
        "use_swiglu_ffn": variant.mlp == "swiglu",
    }
    if variant.registers:
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=variant.registers, **sizes))
    return Dinov2Model(Dinov2Config(**sizes))


def _dinov3(variant: Variant, parameters: dict[str, np.ndarray]) -> PreTrainedModel:
    biased = [bool(bias.any()) for bias in _qkv(_qkv_bias(variant, parameters))]
    config = DINOv3ViTConfig(
        hidden_size=variant.width,
        num_hidden_layers=variant.depth,
        num_attention_heads=variant.heads,
        intermediate_size=variant.hidden,
        patch_size=variant.patch,
        layer_norm_eps=variant.epsilon,
        num_register_tokens=variant.registers,
        use_gated_mlp=variant.mlp == "swiglu",
        hidden_act="silu" if variant.mlp == "swiglu" else "gelu",
        **dict(zip(("query_bias", "key_bias", "value_bias"), biased, strict=True)),
    )
    return DINOv3ViTModel(config)


def _qkv(joined: np.ndarray) -> list[np.ndarray]:
    return np.split(joined, 3, axis=-1)


def _qkv_bias(variant: Variant, parameters: dict[str, np.ndarray]) -> np.ndarray:
    """Return the bias [depth, 3 C] that is added: zero if there is none or where it is masked."""
    if variant.qkv_bias == "masked":
        return parameters["blocks.attention.qkv_bias"] * parameters["blocks.attention.qkv_bias_mask"]
    return parameters.get("blocks.attention.qkv.bias", np.zeros((variant.depth, 3 * variant.width), np.float32))


def live_state(variant: Variant, ours: dict[str, np.ndarray], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return our parameters, or their gradients, under the names and in the layout of `transformers`."""
    patch, width, family = variant.patch, variant.width, 2 if variant.grid else 3
    convolution = "embeddings.patch_embeddings" + (".projection" if family == 2 else "")
    norm = "layernorm" if family == 2 else "norm"
    theirs = {
        "embeddings.cls_token": ours["cls_token"][None, None],
        "embeddings.mask_token": np.zeros(model.embeddings.mask_token.shape, np.float32),  # unused here
        f"{convolution}.weight": ours["patch_embed.kernel"].reshape(patch, patch, 3, width).transpose(3, 2, 0, 1),
        f"{convolution}.bias": ours["patch_embed.bias"],
        f"{norm}.weight": ours["norm.scale"],
        f"{norm}.bias": ours["norm.bias"],
    }
    if variant.registers:
        theirs["embeddings.register_tokens"] = ours["register_tokens"][None]
    if variant.grid:
        positions = np.concatenate([ours["pos_cls"][None], ours["pos_grid"].reshape(-1, width)])
        theirs["embeddings.position_embeddings"] = positions[None]

    expected = model.state_dict()
    has_earlier_names = any(name.endswith("attention.query.weight") for name in expected)
    names = EARLIER_NAMES if has_earlier_names else {}
    stacked = {name.removeprefix("blocks."): value for name, value in ours.items() if name.startswith("blocks.")}
    qkv_bias = _qkv_bias(variant, ours)
    for i in range(variant.depth):
        block = {name: value[i] for name, value in stacked.items()}
        qkv = zip("qkv", _qkv(block["attention.qkv.kernel"]), _qkv(qkv_bias[i]), strict=True)
        layers = {f"attention.{x}_proj": (kernel, bias) for x, kernel, bias in qkv}
        layers["attention.o_proj"] = block["attention.projection.kernel"], block["attention.projection.bias"]
        expand = block["mlp.expand.kernel"], block["mlp.expand.bias"]
        contract = block["mlp.contract.kernel"], block["mlp.contract.bias"]
        if variant.mlp == "swiglu" and has_earlier_names and family == 2:
            layers |= {"mlp.weights_in": expand, "mlp.weights_out": contract}  # the gate comes first, as in our layout
        elif variant.mlp == "swiglu":
            gate, up = zip(*(np.split(array, 2, axis=-1) for array in expand), strict=True)
            layers |= {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": contract}
        elif family == 2:
            layers |= {"mlp.fc1": expand, "mlp.fc2": contract}
        else:
            layers |= {"mlp.up_proj": expand, "mlp.down_proj": contract}
        block_state = {}
        for name, (kernel, bias) in layers.items():
            name = names.get(name, name)
            block_state |= {f"{name}.weight": kernel.T, f"{name}.bias": bias}
        for n in (1, 2):
            block_state |= {f"norm{n}.weight": block[f"norm{n}.scale"], f"norm{n}.bias": block[f"norm{n}.bias"]}
            block_state[f"layer_scale{n}.lambda1"] = block[f"scale{n}.gamma"]
        prefix = f"encoder.layer.{i}" if family == 2 else f"model.layer.{i}"
        theirs |= {f"{prefix}.{name}": value for name, value in block_state.items()}

    # a bias that the configuration of `transformers` omits is zero in ours
    assert not any(value.any() for name, value in theirs.items() if name not in expected)
    return {name: torch.tensor(np.ascontiguousarray(value)) for name, value in theirs.items() if name in expected}
