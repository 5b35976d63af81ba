"""The networks, image in, logits out: a file each, found by its name, that ends in its `FAMILY` (`models/family.py`).

A network is an `nnx.Module`, called as `network(images, present=None)` with images [B, H, W, 1] of grey values in 0..1;
it gives logits [B, H, W, K] float32. One that is planned from the data may take volumes [B, D, H, W, 1] instead, and
its grey values have mean 0 and standard deviation 1. `present`, [B] bool, says which of them BatchNorm's statistics are
of while it trains. What is pretrained of it, and may stay frozen, is its attribute `backbone`. It draws no random
numbers while it trains.

One `of_volumes` takes all slices of volumes, [B, D, H, W, 1] of grey values in 0..1, and gives [B, D, H, W, K]; its
`present` is [B, D]: which slices are the volume's, the first ones, and which only fill it up.

Where a frozen backbone can run once per slice beforehand, the network also has

- `FEATURES`, a line that says what it reads of the backbone: networks that say the same share it in the cache,
- `features(images)` of slices -> that, one array [B, …], such as [B, h, w, C],
- `TO_KEEP_LESS`, phrases that say which of its options make these smaller, if any,
- `on_features(size)` -> the rest of the network, for images of H, W = `size`; its attributes have the same names. It is
  called with the features, or with a pair, features and images, where `READS_IMAGES` of the whole is true.

One whose gradient can be taken part by part has the methods that `training/two_pass.py` names.

One that learns at several resolutions gives in training a list of logits, the finest first.

Where it weighs blocks of its backbone, `block_weights()` tells how: {"blocks": their numbers, "levels": for each level
of the decoder the share of each}.
"""
