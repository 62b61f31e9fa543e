"""What tests share: quick arguments of the embedded model, a built run, a trainer away from zero."""

import inspect
from pathlib import Path

import torch
from peft import get_peft_model

from repeng import SvdSteeringConfig, tiny
from repeng.train.arguments import parse_arguments
from repeng.train.build import build
from repeng.train.trainer import SteeringTrainer

ROOT = Path(__file__).parent.parent
# Arguments of the shortest run that writes a checkpoint at each step.
QUICK_RUN = {
    "save_steps": 1,
    "num_pairs": 8,
    "per_device_train_batch_size": 4,
    "r": 2,
    "layers": 1,
    "target_modules": "q_proj",
    "learning_rate": 1e-3,
    "use_cpu": "true",
    "disable_tqdm": "true",
}


def arguments(tmp_path, **changes):
    """The training arguments of a quick run; those of its task are `task_args`."""
    settings = {
        "num_pairs": 8,
        "max_steps": 1,
        "adapter": "svd",
        "layers": "0.34-0.8",
        "r": 8,
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "disable_tqdm": "true",
        "output_dir": tmp_path,
        "use_cpu": "true",
        **changes,
    }
    argv = [word for key, value in settings.items() if value is not None for word in (f"--{key}", str(value))]
    task_args, args = parse_arguments(["--config", "tiny", *argv])
    args.task_args = task_args
    return args


def prepare(args, **given):
    """The run of these arguments; `given` goes to `build`."""
    return build(args.task_args, args, tiny.task(args.task_args, args.seed), **given)


def some_questions(questions, every):
    """A few questions: targets of more units than an interval needs, and one in `every` of the controls."""
    targets, controls = ([q for q in questions if q.kind == kind] for kind in ("target", "control"))
    return [*targets[::5], *controls[::every]]


def randomise(model, size=0.05):
    """A start away from zero, so that both coefficients differ and every term is at work."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)


def trainer_for(args, change=lambda model: None, given=None, **kwargs):
    """A trainer of a run that starts away from zero."""
    run = prepare(args, **(given or {}))
    change(run.model)
    randomise(run.model)
    kwargs = {"eval_dataset": run.validation, "neutral_texts": run.validation_texts, **kwargs}
    return SteeringTrainer(run.model, args, run.examples, run.tokenizer, **kwargs)


def step(trainer, examples):
    """One forward and backward, as in the training loop."""
    trainer.current_gradient_accumulation_steps = 1  # the loop sets it
    trainer.training_step(trainer.model, trainer.data_collator(examples))


def cache_name():
    """Transformers has renamed the argument."""
    return "cache" if "cache" in inspect.signature(tiny.load()[0].forward).parameters else "past_key_values"


def strongly_turned(model):
    """SmolLM2 with rotations so large that log-probabilities move by nats, and not alike in both directions."""
    config = SvdSteeringConfig(
        r=16,
        target_modules=["residual-writers", "q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"],
        layers_to_transform=[*range(8, 20)],
        rotate_output=True,
    )
    adapted = get_peft_model(model, config)
    randomise(adapted, 0.05)
    return adapted.eval()
