"""Differences of the pairs at every adapted module, from which train.py chooses directions."""

import torch
from peft import get_peft_model

from repeng import SvdSteeringConfig, tiny
from repeng.model.sites import site_module
from repeng.model.tokens import encode
from repeng.train.reference import pair_differences


def test_differences_are_those_of_single_prompts(base, embedded, tokenizer):
    sites = {"target_modules": ["up_proj", "residual"], "layers_to_transform": [1, 3]}
    config = SvdSteeringConfig(r=4, init_weights=False, **sites)
    model = get_peft_model(base, config)
    examples = [
        {f"{side}_ids": encode(tokenizer, getattr(p, side), p.suffix).ids for side in ("chosen", "rejected")}
        for p in tiny.pairs("honesty", 6, 0)
    ]
    found = pair_differences(model, tokenizer, examples, last_n=2)
    assert list(found) == config.resolved_modules and len(found) == 4
    seen = {}
    plain = embedded[0]
    for layer in (1, 3):
        up, whole = site_module(plain, layer, "up_proj"), site_module(plain, layer, "residual")
        name = f"model.layers.{layer}"
        hooks = [
            up.register_forward_pre_hook(lambda _m, args, k=f"{name}.mlp.up_proj": seen.update({k: args[0]})),
            whole.register_forward_hook(lambda _m, _a, out, k=name: seen.update({k: out})),
        ]
        for index, example in enumerate(examples):
            sides = []
            for side in ("chosen_ids", "rejected_ids"):
                with torch.no_grad():
                    plain(torch.tensor([example[side]]))
                sides.append({key: states[0, -2:].mean(dim=0) for key, states in seen.items()})
            for key in seen:
                assert torch.allclose(found[key][index], sides[0][key] - sides[1][key], atol=1e-5), key
        seen.clear()
        for hook in hooks:
            hook.remove()
