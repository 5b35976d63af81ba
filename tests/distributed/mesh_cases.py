"""The cases that `mesh_driver` runs and `test_mesh` compares."""

STEPS = 10
BATCH = 6  # slices or volumes; neither four nor eight devices divide it
NETWORKS = ("convolutional", "frozen", "finetuned")
TRANSFORMERS = ("frozen", "finetuned")  # these have parameters that can be sharded
CASES = {  # devices, whether parameters are sharded, networks
    "one": (1, False, (*NETWORKS, "fusion", "windows")),
    "four": (4, False, (*NETWORKS, "fusion", "windows")),
    "eight": (8, False, NETWORKS),
    "eight, sharded": (8, True, TRANSFORMERS),
}
TWO_PROCESS_CASES = {  # each process has two devices
    "two processes": (4, False, NETWORKS),
    "two processes, sharded": (4, True, TRANSFORMERS),
}
RESUMED_ON = {1: 4, 2: 8, 3: 1}  # epoch -> devices; parameters are sharded on four
