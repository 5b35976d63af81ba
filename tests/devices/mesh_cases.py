"""What `mesh_driver` runs and `test_mesh` compares."""

STEPS = 10
BATCH = 6  # slices, which neither four nor eight devices divide
NETWORKS = ("convolutional", "frozen", "finetuned")
CASES = {  # devices, whether parameters are divided over them (transformers have such), and networks
    "one": (1, False, NETWORKS),
    "eight": (8, False, ("convolutional", "finetuned")),
    "eight, divided": (8, True, ("frozen", "finetuned")),
}
OF_TWO_PROCESSES = {  # which see two devices each
    "two processes": (4, False, ("convolutional",)),
    "two processes, divided": (4, True, ("finetuned",)),
}
RESUMED_ON = {1: 4, 2: 1}  # devices of each epoch; on four the parameters are divided
