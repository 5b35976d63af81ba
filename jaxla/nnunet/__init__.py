"""nnU-Net v2 in JAX, in reading order.

`plan` (the plan file), `preprocessing` and `resampling` (scans as the plan wants them), `planner` (scans -> plan),
`patches` and `augmentation` (what the network trains on), `network`, `tiles` (inference), `postprocessing`, and
`converted` (networks that nnU-Net itself trained).
"""
