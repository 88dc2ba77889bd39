"""K LoRA adapters that train at once on one frozen base model. There are no losses, no Trainer and no selector here.

- `model`: [`BranchModel`], the PEFT model with K branches.
- `layers`, `saved_modules`: the K-branch forward of PEFT's LoRA layers, and of modules that each branch trains whole.
- `kernels`: the batched products of the LoRA layers.
- `passes`: a pass, which is one run of the base model over some branches: all at once, in chunks, or with each line
  of the batch on one branch. It also holds the losses of a mixture of experts' routers.
- `trial`: finds out where a model's batch can be repeated for the K branches.
- `batches`: the rows of a batch, and their distribution among the branches.
- `views`: stand-ins for the model, one for each branch, for losses that are computed from `model(**inputs)`.
- `graphs`, `static_weights`: replay of decoder layers as CUDA graphs, and the memory that these read.
"""
