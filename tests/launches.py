"""What `accelerate launch` makes of the configurations in configs/accelerate."""

from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

CONFIGS = Path(__file__).parent.parent / "configs" / "accelerate"


def launch_arguments(name):
    """The launcher's arguments, with those of the file filled in."""
    parsed = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "train.py"])
    arguments, defaults, _ = _validate_launch_command(parsed)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return arguments


def launch_environment(name):
    """The variables that choose how processes share the work: of FSDP or of DeepSpeed."""
    arguments = launch_arguments(name)
    if arguments.use_deepspeed:
        environment = prepare_deepspeed_cmd_env(arguments)[1]
        prefixes = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_CONFIG_DS", "ACCELERATE_DEEPSPEED")
    else:
        environment, prefixes = prepare_multi_gpu_env(arguments), ("ACCELERATE_USE_FSDP", "FSDP_")
    return {key: value for key, value in environment.items() if key.startswith(prefixes)}
