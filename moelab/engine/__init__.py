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

The engine imports models, data, config and the kernels. `moelab.training.loop` trains with it; a step of a script of
one's own, which torchrun, srun or `launch` starts on every rank:

    process.join()                                   # of `launch.process`; a single rank joins nobody
    mesh = Mesh(ParallelConfig(tensor=2, data=4), config.experts)
    model = parallel.build(config, seed, mesh)       # model.module is this rank's part, a GPT
    sync, optimizer = GradientSync(model), AdamW(model.module.parameters())

    for i, (tokens, targets) in enumerate(parts):    # of data rank mesh.data.index; equally many on all ranks
        if i + 1 == len(parts):
            sync.arm()
        output = model.module(tokens, targets_BT=targets)
        ((output.loss + output.routing_loss()) / len(parts)).backward()
    sync.finish()                                    # gradients are now those of the mean over all data ranks
    norm = gradients.clip(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()

`checkpoint` shows how it is saved; `process.leave()` ends it, after the last write.
"""
