"""Profiles of a model's step: time, work, error and backend by layer.

Parts: `api` (the function `patchgen_fast.profile`), `timeline` (where a model is at every moment),
`measure` (rounds), `work` (FLOPs and bytes), `errors`, `kernels` (of compiled models), `trace`
(Kineto), `rows`, `result` and `table` (what is shown), `command`.
"""
