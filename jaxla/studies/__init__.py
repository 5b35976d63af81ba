STUDY, RUNS = "study.json", "runs"  # in a study's folder: its schedule, and the folders of its runs
