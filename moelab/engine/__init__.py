"""The distributed expert-parallel engine, its checkpoints, and the launcher of its ranks.

groups          process groups, made in one place
mesh            all groups of a rank: data, tensor and expert parallel
collectives     the engine's collectives, their observers, and the count of what they send
differentiable  collectives that autograd goes through
exchange        sends tokens to the ranks of their experts and back; `padded` is the paper's baseline
parallel        builds a rank's part of a model; `placement` says which shards it holds, `tensor_slicing` cuts layers
gradients       sums over replicas, the global norm
checkpoint/     saves, loads and reshards
cluster/        checks the ranks of an allocation
launch/         starts, watches and ends ranks
testing         runs functions on N ranks of this machine; `threads`: hundreds of ranks as threads

The engine imports models, data, config and the kernels.
"""
