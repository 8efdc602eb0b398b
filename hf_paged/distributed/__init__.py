"""One model over several processes: tensor parallelism on torch.distributed."""
