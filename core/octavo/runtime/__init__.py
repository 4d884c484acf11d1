"""The runtime: the runner, its buffers, the sampler and the executors."""
