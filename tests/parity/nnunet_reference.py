"""nnU-Net (Isensee, Jaeger et al. 2021) in PyTorch, built from a plan, with the names of nnU-Net's state dicts."""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn
from torch.nn import functional

from convert_weights.nnunet import nnunet_rows
from tests.tiny import flat_arrays, flat_state


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


def nnunet_to_torch(configuration, source):
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


def make_nnunet_reference(configuration, network):
    """Return the PyTorch reference of nnU-Net with our parameters."""
    state = {name: torch.from_numpy(a.copy()) for name, a in nnunet_to_torch(configuration, network).items()}
    reference = ReferenceNNUNet(configuration, state["decoder.seg_layers.0.bias"].shape[0])
    reference.to(next(iter(state.values())).dtype).load_state_dict(state)
    return reference
