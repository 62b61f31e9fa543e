"""Names of the files that several modules write and read."""

CONFIG = "config.yaml"  # the configuration of a run
REPORT, TABLE, PAGE, PICTURE = "report.json", "report.csv", "report.html", "report.png"
REPORT_FILES = (REPORT, TABLE, PAGE, PICTURE)
EVALUATION = "evaluation"  # default subfolder for the report of a later evaluation, in the folder of an adapter
CALIBRATION = "calibration.json"  # stands beside a LoRA, whose own files cannot hold a calibration
CARD = "README.md"  # the model card
VECTOR = "vector.safetensors"  # a vector, in a repository on the hub
