"""K LoRA adapters on one frozen base, trained at once: no losses, no Trainer, no selector.

`model` has [`BranchModel`], `passes` what one run over branches is, `running` all at once or in chunks, `layers` and
`layer_groups` the K-branch forward, `expansion` where a batch widens and `trial` how that is found out, `rows` what
counts as one sequence, `routers` a mixture of experts' loss, `kernels` the products. `graphs` replays decoder layers
as CUDA graphs, which read `static_weights`; `attention` leaves out plans and masks that cost more than they say.
"""
