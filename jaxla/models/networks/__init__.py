"""The networks: image in, logits out. Each file holds one network: its options, its modules, and how it is built.

To add a network, write one file here with

- a frozen dataclass derived from `NetworkOptions`, or from `BackboneOptions` or `TransformerOptions` if the network has
  a backbone. Its fields become the options `--model.<field>`; the `Args` in its docstring and those of its bases become
  their help text. Its method `build(outputs, dtype, rngs)` returns the network (`backbone` is a further argument if
  there is one);
- the `nnx.Module`, called as `network(images)` with images [B, H, W, 1] of grey values in 0..1, which returns logits
  [B, H, W, K] in float32;

and a row in `METHODS` of a file in `experiments/` that names the options class.

A network may also have:

- An argument `present`, [B] bool: the images that BatchNorm's statistics are computed from during training. The others
  only pad a batch.
- An attribute `backbone`: the part that is pretrained and may stay frozen.
- `sample = "volumes"` in its options: it reads volumes [B, D, H, W, 1] and returns [B, D, H, W, K]. `present` is then
  [B, D], True for the slices of the volume, which come first; the others are padding.
- Five attributes with which a frozen backbone runs only once per slice:
    - `features(images)` returns the features [B, ...] that the rest of the network reads.
    - `feature_description` says in words which features these are. Networks with the same description share them in
      the cache.
    - `on_features(size)` returns the rest of the network, with the same attribute names, for images of H, W = `size`.
    - `reads_images` says whether the rest is called with a pair of features and images instead of features.
    - `smaller_features` lists options that make the features smaller, as advice to the user.
- The methods listed in `jaxla.training.two_pass`, if its gradient can be computed window by window.
- A list of logits as its output in training, finest first, if it is supervised at several resolutions.
- A method `block_weights()` that returns {"blocks": block numbers, "levels": the weight of each block at each decoder
  level}.

A network draws no random numbers during training.
"""
