"""What `mesh_driver` runs and `test_mesh` compares."""

STEPS = 10
BATCH = 6  # slices or volumes, which neither four nor eight devices divide
NETWORKS = ("convolutional", "frozen", "finetuned")
TRANSFORMERS = ("frozen", "finetuned")  # which have parameters that are divided
CASES = {  # devices, whether parameters are divided over them, and networks
    "one": (1, False, (*NETWORKS, "fusion", "windows")),
    "four": (4, False, (*NETWORKS, "fusion", "windows")),
    "eight": (8, False, NETWORKS),
    "eight, divided": (8, True, TRANSFORMERS),
}
OF_TWO_PROCESSES = {  # which see two devices each
    "two processes": (4, False, NETWORKS),
    "two processes, divided": (4, True, TRANSFORMERS),
}
RESUMED_ON = {1: 4, 2: 8, 3: 1}  # devices of each epoch; on four the parameters are divided
