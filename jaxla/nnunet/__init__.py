"""nnU-Net v2 in JAX, in reading order.

`plan` (the plan file), `preprocessing` and `resampling` (scans prepared for a plan), `planner` (scans -> plan),
`patches` and `augmentation` (training samples), `network`, `tiles` (inference), `postprocessing`, and
`converted` (networks that nnU-Net itself trained).
"""
