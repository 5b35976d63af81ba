"""Build PyTorch modules, written from the papers, with the parameters of our networks.

Encoders have torchvision's names, so that the conversion tables fill them; everything else has our names.
"""

import numpy as np
import torch
from flax import nnx
from torch import nn

from convert_weights.layout import to_theirs
from convert_weights.resnet import resnet_rows
from convert_weights.vgg import vgg_rows
from jaxla.models.backbones.resnet import ResNet
from jaxla.models.backbones.vgg import VGG
from jaxla.models.networks.attention_unet import AttentionUNet
from jaxla.models.networks.fusion import FusionDecoder
from jaxla.models.networks.resnet_unet import ResNetUNet
from jaxla.models.networks.segnet import SegNet
from jaxla.models.networks.transformer_segmenter import ConvolutionalDecoder
from jaxla.models.networks.unet import UNet
from jaxla.models.networks.windows import WindowDecoder
from jaxla.models.ops.norms import InstanceNorm
from tests.parity.decoder_references import ReferenceDecoder, ReferenceFusionDecoder, ReferenceWindowDecoder
from tests.parity.network_references import (
    ReferenceAttentionUNet,
    ReferenceResNet,
    ReferenceResNetUNet,
    ReferenceSegNet,
    ReferenceUNet,
    ReferenceVGG,
    Unit,
)
from tests.tiny import flat_arrays, flat_state


def make_reference(network, size=None):
    """Return the reference of a network, encoder or decoder, with its parameters and statistics, in evaluation mode.

    Args:
        size: H and W of a decoder's logits.
    """
    match network:
        case ConvolutionalDecoder():
            width, first = network.token_classifier.in_features, network.token_classifier.out_features
            widths = (first, *(stage.norm.scale.shape[0] for stage in network.stages))
            reference = ReferenceDecoder(width, widths, network.logits.out_features, size)
        case FusionDecoder():
            widths = [stage.project.out_features for stage in network.stages]
            widths.append(network.stages[-1].convolutions.second.norm.scale.shape[0])
            stems = [stage.stem.norm.scale.shape[0] if stage.stem else 0 for stage in network.stages]
            width, blocks = network.project.in_features, network.fusion.shape[1]
            rows = len(network.fusion.scalars) if hasattr(network.fusion, "scalars") else 0
            reference = ReferenceFusionDecoder(width, blocks, rows, widths, network.logits.out_features, stems, size)
        case WindowDecoder():
            widths = [unit.norm.scale.shape[0] for unit in network.units]
            width, places = network.levels[0].project.in_features, network.levels[0].depth_places
            depth = 1 if network.slicewise else 3
            reference = ReferenceWindowDecoder(width, widths, network.logits.out_features, places, depth)
        case AttentionUNet():
            reference = ReferenceAttentionUNet(unet_widths(network), network.logits.out_features)
        case UNet():
            reference = ReferenceUNet(unet_widths(network), network.logits.out_features)
            if isinstance(network.down[0].first.norm, InstanceNorm):
                for unit in reference.modules():
                    if isinstance(unit, Unit):
                        unit.norm = nn.InstanceNorm2d(unit.norm.num_features, affine=True)
        case ResNetUNet():
            widths = [stage.second.norm.scale.shape[0] for stage in network.up]
            blocks = network.backbone.variant.blocks
            reference = ReferenceResNetUNet(blocks, widths, network.logits.out_features)
        case SegNet():
            reference = ReferenceSegNet(network.backbone.variant.stages, network.logits.out_features)
        case ResNet():
            reference = ReferenceResNet(network.variant.blocks)
        case VGG():
            reference = ReferenceVGG(network.variant.stages)
    state = {name: torch.from_numpy(array.copy()) for name, array in network_to_torch(network, network).items()}
    missing, extra = reference.load_state_dict(state, strict=False)
    assert not extra
    assert all(name.endswith("num_batches_tracked") for name in missing)
    dtype = next(iter(state.values())).dtype
    return reference.to(dtype).eval()


def unet_widths(unet):
    return [convolutions.second.norm.scale.shape[0] for convolutions in unet.down]


def network_to_torch(network, source):
    """Return our parameters, statistics or gradients under the reference's names and in its layout: name -> array.

    Args:
        network: our network, encoder or decoder.
        source: the network itself, or a state of the same structure, such as its gradients.
    """
    arrays = flat_arrays(source, nnx.Variable) if isinstance(source, nnx.Module) else flat_state(source)
    if isinstance(network, ResNet | VGG):
        return encoder_to_torch(network, arrays)
    ours = {name: array for name, array in arrays.items() if not name.startswith("backbone.")}
    theirs = dict(array_to_torch(name, array) for name, array in ours.items())
    if hasattr(network, "backbone"):
        backbone_arrays = {
            name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")
        }
        theirs |= {
            f"backbone.{name}": array for name, array in encoder_to_torch(network.backbone, backbone_arrays).items()
        }
    return theirs


def encoder_to_torch(encoder, arrays):
    rows = resnet_rows(encoder.variant) if isinstance(encoder, ResNet) else vgg_rows(encoder.variant)

    def read(name, block):
        return arrays[name] if block is None else arrays[name][block]

    if next(iter(arrays.values())).dtype == np.float32:
        return dict(to_theirs(rows, arrays, read))
    theirs = {}  # `to_theirs` would round float64 to float32
    for row in rows:
        if row.ours in arrays:
            array = read(row.ours, row.block)
            theirs[row.theirs] = array.transpose(np.argsort(row.axes)) if row.axes else array
    return theirs


def array_to_torch(name, array):
    """Return the reference's name of one of our arrays, and the array in its layout."""
    module, _, leaf = name.rpartition(".")
    if leaf == "kernel" and module.startswith("up.") and array.shape[1:3] == (2, 2):  # a transposed convolution
        return f"{module}.weight", array.transpose(0, 3, 1, 2)
    if leaf == "kernel" and module.endswith(".project_skip"):  # a convolution over 2×2 pixels, as a matrix
        outputs = array.shape[-1]
        return f"{module}.weight", array.reshape(2, 2, -1, outputs).transpose(3, 2, 0, 1)
    if leaf == "kernel" and array.ndim == 2:  # a 1×1 convolution, as a matrix
        return f"{module}.weight", array.T[:, :, None, None]
    if leaf == "kernel":
        *sides, inputs, outputs = range(array.ndim)
        return f"{module}.weight", array.transpose(outputs, inputs, *sides)
    return f"{module}.{ {'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}.get(leaf, leaf) }", array
