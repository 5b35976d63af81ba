"""The cases that `mesh_driver` runs and `test_mesh` compares."""

STEPS = 10
BATCH = 6  # slices or volumes; not divisible by four or eight devices
NETWORKS = ("convolutional", "finetuned", "windows")  # `windows` on a frozen backbone
CASES = {  # devices, whether parameters are sharded, networks
    "one": (1, False, NETWORKS),
    "four": (4, False, ("finetuned", "windows")),  # `convolutional` runs on four devices in two processes
    "eight, sharded": (8, True, ("finetuned",)),
}
TWO_PROCESS_CASES = {  # each process has two devices
    "two processes": (4, False, ("convolutional",)),
    "two processes, sharded": (4, True, ("finetuned",)),
}
RESUMED_ON = {1: 1, 2: 4, 3: 1}  # epoch -> devices; parameters are sharded on four
