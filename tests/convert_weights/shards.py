"""Write a checkpoint in several files, as Hugging Face does."""

import json

import torch


def write_shards(folder, state, count=3):
    """Write `count` shards and their index; return the index and the shards."""
    shard_names = {name: f"pytorch_model-{i % count + 1:05}-of-{count:05}.bin" for i, name in enumerate(state)}
    shards = [folder / name for name in sorted(set(shard_names.values()))]
    for shard in shards:
        torch.save({name: value for name, value in state.items() if shard_names[name] == shard.name}, shard)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": shard_names}))
    return index, shards
