"""PyTorch modules of the convolutional networks and decoders, written from their papers, with our parameters.

Encoders use torchvision's names, so that the conversion tables apply; everything else uses our names.
"""

from itertools import pairwise
from math import gcd

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn
from torch.nn import functional

from convert_weights.layout import to_theirs
from convert_weights.nnunet import nnunet_rows
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
from tests.tiny import flat_arrays

# --- U-Net: Ronneberger et al. 2015, figure 1, padded, with BatchNorm ---


class Unit(nn.Module):
    def __init__(self, inputs, outputs, bias=False):
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.norm(self.convolution(x)).relu()


class Double(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.first, self.second = Unit(inputs, outputs), Unit(outputs, outputs)

    def forward(self, x):
        return self.second(self.first(x))


class ReferenceUNet(nn.Module):
    def __init__(self, widths, outputs):
        super().__init__()
        self.down = nn.ModuleList([Double(i, o) for i, o in pairwise((1, *widths))])
        self.up = nn.ModuleList([nn.ConvTranspose2d(o, i, 2, 2) for i, o in pairwise(widths)])
        self.join = nn.ModuleList([Double(2 * width, width) for width in widths[:-1]])
        self.logits = nn.Conv2d(widths[0], outputs, 1)

    def forward(self, x):
        levels = []
        for convolutions in self.down:
            x = convolutions(functional.max_pool2d(x, 2) if levels else x)
            levels.append(x)
        for i in reversed(range(len(self.up))):
            x = self.join[i](torch.cat([self.skip(i, levels[i], x), self.up[i](x)], dim=1))
        return self.logits(x)

    def skip(self, level, x, below):
        return x


# --- Attention U-Net: Oktay et al. 2018, equation 1 and figure 2, a gate on every skip ---


class ReferenceGate(nn.Module):
    def __init__(self, skip, gating):
        super().__init__()
        self.project_skip = nn.Conv2d(skip, skip, 2, 2, bias=False)
        self.project_gating = nn.Conv2d(gating, skip, 1)
        self.psi = nn.Conv2d(skip, 1, 1)

    def forward(self, x, g):
        weight = self.psi((self.project_skip(x) + self.project_gating(g)).relu()).sigmoid()
        return x * functional.interpolate(weight, scale_factor=2, mode="bilinear", align_corners=False)


class ReferenceAttentionUNet(ReferenceUNet):
    def __init__(self, widths, outputs):
        super().__init__(widths, outputs)
        self.gates = nn.ModuleList([ReferenceGate(i, o) for i, o in pairwise(widths)])

    def skip(self, level, x, below):
        return self.gates[level](x, below)


# --- ResNet: He et al. 2016, table 1 and figure 5; the stride on the 3×3 convolution ---


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        if inputs != 4 * width or stride > 1:
            projection = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()


class ReferenceResNet(nn.Module):
    """An encoder that returns the features of the stem, those after its max-pool, and those of each stage."""

    def __init__(self, blocks):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64)
        inputs = 64
        for i, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), start=1):
            first = Bottleneck(inputs, width, 1 if i == 1 else 2)
            rest = (Bottleneck(4 * width, width, 1) for _ in range(count - 1))
            setattr(self, f"layer{i}", nn.Sequential(first, *rest))
            inputs = 4 * width

    def forward(self, x):
        stem = self.bn1(self.conv1(x)).relu()
        features = [stem, functional.max_pool2d(stem, 3, 2, padding=1)]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            features.append(stage(features[-1]))
        return features


# --- U-Net on a ResNet: the decoder of segmentation_models_pytorch ---


class ReferenceResNetUNet(nn.Module):
    def __init__(self, blocks, widths, outputs):
        super().__init__()
        self.backbone = ReferenceResNet(blocks)
        below = (2048, *widths[:-1])
        skips = (1024, 512, 256, 64, 0)
        self.up = nn.ModuleList([Double(i + s, o) for i, s, o in zip(below, skips, widths, strict=True)])
        self.logits = nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, x):
        stem, _, *stages = self.backbone(x)
        *skips, x = [stem, *stages]
        for stage in self.up:
            x = functional.interpolate(x, scale_factor=2, mode="nearest")
            x = stage(torch.cat([x, skips.pop()], dim=1) if skips else x)
        return self.logits(x)


# --- VGG-16: Simonyan and Zisserman 2015, table 1, column D, with BatchNorm; SegNet: Badrinarayanan et al. 2017 ---


class ReferenceVGG(nn.Module):
    """An encoder that returns the features after each max-pool, and the indices of the maxima."""

    def __init__(self, stages):
        super().__init__()
        layers, inputs = [], 3
        for widths in stages:
            for width in widths:
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            layers.append(nn.MaxPool2d(2, return_indices=True))
        self.features = nn.Sequential(*layers)

    def forward(self, x):
        pooled, indices = [], []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                x, index = x
                pooled.append(x)
                indices.append(index)
        return pooled, indices


class ReferenceSegNet(nn.Module):
    def __init__(self, stages, outputs):
        super().__init__()
        self.backbone = ReferenceVGG(stages)
        # mirrored; for VGG-16: 64 64, 128 128 64, 256 256 256 128, 512 512 512 256, 512 512 512 512
        widths = [stages[0], *([*stage, above[-1]] for above, stage in pairwise(stages))]
        self.up = nn.ModuleList(
            [nn.ModuleList([Unit(i, o, bias=True) for i, o in pairwise(stage)]) for stage in widths]
        )
        self.logits = nn.Conv2d(stages[0][0], outputs, 3, padding=1)

    def forward(self, x):
        pooled, indices = self.backbone(x)
        x = pooled[-1]
        for stage, index in zip(reversed(self.up), reversed(indices), strict=True):
            x = functional.max_unpool2d(x, index, 2)
            for unit in stage:
                x = unit(x)
        return self.logits(x)


# --- paper 1's decoder ---


class ReferenceDecoder(nn.Module):
    def __init__(self, width, widths, outputs, size):
        super().__init__()
        self.token_classifier = nn.Conv2d(width, widths[0], 1)
        self.mix = nn.Conv2d(widths[0], widths[0], 7, padding=3)
        self.stages = nn.ModuleList([Unit(i, o) for i, o in pairwise(widths)])
        self.logits = nn.Conv2d(widths[-1], outputs, 3, padding=1)
        self.size = size

    def forward(self, x):
        x = self.mix(functional.selu(self.token_classifier(x)))
        for stage in self.stages:
            x = stage(functional.interpolate(x, scale_factor=2, mode="bilinear"))
        if x.shape[2:] != self.size:
            x = functional.interpolate(x, size=self.size, mode="bilinear")
        return self.logits(x)


# --- paper 2's decoder ---


class ReferenceStage(nn.Module):
    def __init__(self, width, inputs, outputs, stem):
        super().__init__()
        self.project = nn.Conv2d(width, inputs, 1)
        self.stem = Unit(3, stem) if stem else None
        self.convolutions = Double(inputs + stem, outputs)

    def forward(self, x, fused, images):
        size = [2 * side for side in x.shape[2:]]
        x = functional.interpolate(x, size=size, mode="bilinear")
        x = x + functional.interpolate(self.project(fused), size=size, mode="bilinear")
        if self.stem:
            images = functional.interpolate(images, size=size, mode="bilinear", antialias=True)
            x = torch.cat([x, self.stem(images)], dim=1)
        return self.convolutions(x)


class ReferenceFusion(nn.Module):
    """Weighted sums of blocks, with one row of scalars per level, one for all levels, or none for equal weights."""

    def __init__(self, levels, blocks, rows):
        super().__init__()
        self.shape = levels, blocks
        if rows:
            self.scalars = nn.Parameter(torch.zeros(rows, blocks))

    def forward(self, features):
        scalars = self.scalars if hasattr(self, "scalars") else features.new_zeros(self.shape)
        return torch.einsum("kl,blchw->kbchw", scalars.softmax(1).expand(self.shape), features)


class ReferenceFusionDecoder(nn.Module):
    """Decode features [B, blocks, C, h, w] and images [B, 3, H, W] to logits."""

    def __init__(self, width, blocks, rows, widths, outputs, stems, size):
        super().__init__()
        self.fusion = ReferenceFusion(len(widths), blocks, rows)
        self.project = nn.Conv2d(width, widths[0], 1)
        stages = zip(pairwise(widths), stems, strict=True)
        self.stages = nn.ModuleList([ReferenceStage(width, i, o, stem) for (i, o), stem in stages])
        self.logits = nn.Conv2d(widths[-1], outputs, 3, padding=1)
        self.size = size

    def forward(self, features, images):
        first, *rest = self.fusion(features)
        x = self.project(first)
        for stage, fused in zip(self.stages, rest, strict=True):
            x = stage(x, fused, images)
        return self.logits(functional.interpolate(x, size=self.size, mode="bilinear"))


# --- paper 3's decoder, of one window ---


class ReferenceLevel(nn.Module):
    def __init__(self, width, outputs, places):
        super().__init__()
        self.project = nn.Conv2d(width, outputs, 1)  # 1×1×1
        self.depth = nn.Parameter(torch.zeros(places, outputs)) if places else None

    def forward(self, x, slices, window):
        x = convolve_voxels(self.project, x)
        if self.depth is None:
            return x
        depth = functional.interpolate(self.depth.T[None], size=slices, mode="linear", align_corners=False)
        return x + depth[:, :, window.start : window.stop, None, None]


class ReferenceWindowUnit(nn.Module):
    def __init__(self, inputs, outputs, depth):
        super().__init__()
        self.convolution = nn.Conv3d(inputs, outputs, (depth, 3, 3), padding=(depth // 2, 1, 1), bias=False)
        self.norm = nn.GroupNorm(gcd(8, outputs), outputs)

    def forward(self, x):
        return self.norm(self.convolution(x)).relu()


class ReferenceWindowDecoder(nn.Module):
    """Decode features [B, 4, C, d, h, w] of the slices `window`, a range, of a volume of `slices` slices."""

    def __init__(self, width, widths, outputs, places, depth):
        super().__init__()
        inputs = (widths[0], *widths[:-1])
        self.levels = nn.ModuleList([ReferenceLevel(width, i, places) for i in inputs])
        self.units = nn.ModuleList([ReferenceWindowUnit(i, o, depth) for i, o in zip(inputs, widths, strict=True)])
        self.logits = nn.Conv2d(widths[-1], outputs, 1)

    def forward(self, features, slices, window):
        x = None
        for level, unit, deepest in zip(self.levels, self.units, (3, 2, 1, 0), strict=True):
            projected = level(features[:, deepest], slices, window)
            if x is None:
                x = projected
            else:
                x = functional.interpolate(x, scale_factor=(1, 2, 2), mode="trilinear")
                x = x + functional.interpolate(projected, size=x.shape[2:], mode="trilinear")
            x = unit(x)
        return convolve_voxels(self.logits, x)


def convolve_voxels(convolution, x):
    """Apply a 1×1×1 convolution to [B, C, d, h, w] as a matrix product, because Conv3d is slow on CPU."""
    return torch.einsum("oc,bcdhw->bodhw", convolution.weight[:, :, 0, 0], x) + convolution.bias[:, None, None, None]


# --- nnU-Net: Isensee, Jaeger et al. 2021, built from a plan; names as in nnU-Net's state dicts ---


class ReferenceConvolutions(nn.Module):
    """`count` blocks of convolution, InstanceNorm and LeakyReLU; only the first convolution is strided."""

    def __init__(self, axes, inputs, outputs, kernel, stride, count):
        super().__init__()
        convolution, norm = (getattr(nn, f"{kind}{axes}d") for kind in ("Conv", "InstanceNorm"))
        units = []
        for i in range(count):
            unit = nn.Module()
            padding = [side // 2 for side in kernel]
            unit.conv = convolution(inputs if i == 0 else outputs, outputs, kernel, stride if i == 0 else 1, padding)
            unit.norm = norm(outputs, eps=1e-5, affine=True)
            units.append(unit)
        self.convs = nn.Sequential(*units)

    def forward(self, x):
        for unit in self.convs:
            x = functional.leaky_relu(unit.norm(unit.conv(x)), 0.01)
        return x


class ReferenceNNUNet(nn.Module):
    """nnU-Net's network, which returns the logits of every resolution, the finest first."""

    def __init__(self, configuration, outputs):
        super().__init__()
        axes, features = len(configuration.patch_size), configuration.features_per_stage
        self.encoder, self.decoder = nn.Module(), nn.Module()
        kernels, strides = configuration.kernel_sizes, configuration.strides
        stages = zip(pairwise((1, *features)), kernels, strides, configuration.n_conv_per_stage, strict=True)
        self.encoder.stages = nn.Sequential(
            *(nn.Sequential(ReferenceConvolutions(axes, i, o, *options)) for (i, o), *options in stages)
        )
        self.decoder.stages, self.decoder.transpconvs, self.decoder.seg_layers = (nn.ModuleList() for _ in range(3))
        levels = range(configuration.n_stages - 2, -1, -1)
        for level, count in zip(levels, configuration.n_conv_per_stage_decoder, strict=True):
            below, width, stride = features[level + 1], features[level], strides[level + 1]
            up = getattr(nn, f"ConvTranspose{axes}d")(below, width, stride, stride)
            self.decoder.transpconvs.append(up)
            convolutions = ReferenceConvolutions(axes, 2 * width, width, kernels[level], 1, count)
            self.decoder.stages.append(convolutions)
            self.decoder.seg_layers.append(getattr(nn, f"Conv{axes}d")(width, outputs, 1))

    def forward(self, x):
        skips = []
        for stage in self.encoder.stages:
            x = stage(x)
            skips.append(x)
        skips.pop()
        logits = []
        for up, stage, layer in zip(
            self.decoder.transpconvs, self.decoder.stages, self.decoder.seg_layers, strict=True
        ):
            x = stage(torch.cat([up(x), skips.pop()], dim=1))
            logits.append(layer(x))
        return logits[::-1]


def nnunet_as_theirs(configuration, source):
    """Return our parameters or gradients of nnU-Net under the names of nnU-Net's state dict."""
    arrays = flat_arrays(source, nnx.Variable) if isinstance(source, nnx.Module) else flat_state(source)
    rows = nnunet_rows(configuration, arrays["logits.0.bias"].shape[0])
    return {
        row.theirs: arrays[row.ours].transpose(np.argsort(row.axes)) if row.axes else arrays[row.ours]
        for row in rows
        if not row.optional
    }


def fill_nnunet(network, configuration, tensors):
    """Set the parameters of our nnU-Net from the arrays of nnU-Net's state dict, by name."""
    variables = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(network))}
    for row in nnunet_rows(configuration, tensors["decoder.seg_layers.0.bias"].shape[0]):
        if not row.optional:
            array = tensors[row.theirs]
            variables.pop(row.ours).set_value(jnp.asarray(array.transpose(row.axes) if row.axes else array))
    assert not variables


def nnunet_reference_of(configuration, network):
    """Return the PyTorch reference of nnU-Net with our parameters."""
    state = {name: torch.from_numpy(a.copy()) for name, a in nnunet_as_theirs(configuration, network).items()}
    reference = ReferenceNNUNet(configuration, state["decoder.seg_layers.0.bias"].shape[0])
    reference.to(next(iter(state.values())).dtype).load_state_dict(state)
    return reference


# --- parameters ---


def reference_of(network, size=None):
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
            width, places = network.levels[0].project.in_features, network.levels[0].places
            depth = 1 if network.slicewise else 3
            reference = ReferenceWindowDecoder(width, widths, network.logits.out_features, places, depth)
        case AttentionUNet():
            reference = ReferenceAttentionUNet(widths_of(network), network.logits.out_features)
        case UNet():
            reference = ReferenceUNet(widths_of(network), network.logits.out_features)
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
    state = {name: torch.from_numpy(array.copy()) for name, array in as_theirs(network, network).items()}
    missing, extra = reference.load_state_dict(state, strict=False)
    assert not extra
    assert all(name.endswith("num_batches_tracked") for name in missing)
    dtype = next(iter(state.values())).dtype
    return reference.to(dtype).eval()


def widths_of(unet):
    return [convolutions.second.norm.scale.shape[0] for convolutions in unet.down]


def as_theirs(network, source):
    """Return our parameters, statistics or gradients under the reference's names and in its layout: name -> array.

    Args:
        network: our network, encoder or decoder.
        source: the network itself, or a state of the same structure, such as its gradients.
    """
    arrays = flat_arrays(source, nnx.Variable) if isinstance(source, nnx.Module) else flat_state(source)
    if isinstance(network, ResNet | VGG):
        return encoder_as_theirs(network, arrays)
    ours = {name: array for name, array in arrays.items() if not name.startswith("backbone.")}
    theirs = dict(to_torch(name, array) for name, array in ours.items())
    if hasattr(network, "backbone"):
        backbone_arrays = {
            name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")
        }
        theirs |= {
            f"backbone.{name}": array for name, array in encoder_as_theirs(network.backbone, backbone_arrays).items()
        }
    return theirs


def flat_state(state):
    return {".".join(map(str, path)): np.asarray(variable) for path, variable in nnx.to_flat_state(state)}


def encoder_as_theirs(encoder, arrays):
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


def to_torch(name, array):
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
