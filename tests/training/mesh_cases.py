"""What `mesh_driver` runs and `test_mesh` compares."""

STEPS = 10
BATCH = 6  # slices, which neither four nor eight devices divide
NETWORKS = ("convolutional", "frozen", "finetuned")
CASES = {  # devices, and whether parameters are divided over them
    "one": (1, False),
    "four": (4, False),
    "eight": (8, False),
    "eight, divided": (8, True),
}
RESUMED_ON = [4, 8, 1]  # devices of each epoch; on four the parameters are divided
