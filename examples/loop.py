"""The training method on one page, without a trainer: pairs -> adapter -> loss -> optimizer step.

Copy this file to change the method. `uv run python examples/loop.py` trains a LoRA on the embedded model (one or two
minutes on a CPU), prints the log-odds of held-out questions at three coefficients, and saves the adapter.

Dimension letters: `b` pairs, `t` tokens, `d` width, `v` vocabulary, `k` directions, `n` last tokens of a prompt,
`s` the four texts of a pair (chosen, rejected, the same prompt without a persona, a neutral text), `p` the first three
of them (the prompts), `c` coefficient side (plus, minus). The loss is derived in docs/loss_geometry.md.
"""

from typing import NamedTuple

import torch
from einops import einsum, rearrange, reduce, repeat
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from repeng import PairCollator, evaluate, inner_contrastive_loss, steer, tiny
from repeng.model.sites import capture, decoder_layers
from repeng.train.collator import tokenize_examples

TRAIT, PAIRS, BATCH, STEPS, LEARNING_RATE, SEED = "honesty", 128, 16, 60, 3e-3, 0
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
INPUTS = ("input_ids", "attention_mask", "position_ids")
LAST_TOKENS = 6  # tokens at the end of each prompt whose hidden states are separated
NEXT_TOKENS = 32  # next tokens per persona that the order term looks at


class Reference(NamedTuple):
    """Everything that the loss needs from the frozen base model. It never changes, so it is computed once."""

    hs: Tensor  # (p b n d) hidden states of the last tokens
    logp: Tensor  # (s b t-1) log-probability of each next token
    direction: Tensor  # (d k) preference direction, + toward chosen
    scale: Tensor  # (k) mean distance between chosen and rejected along it
    next_weight: Tensor  # (b v) what chosen says next (+) and what rejected says next (-)
    gap: Tensor  # (p b) log-probability of the former minus that of the latter
    gap_weight: Tensor  # (b) how much the personas disagree about the next token; 1 on average
    gap_unit: float  # how much the personas change the gap, in nats


def make_batch(examples: list, tokenizer) -> dict[str, Tensor]:
    """The inputs of the model `(s b t)`, and two masks that say what the loss counts.

    `hs_mask (p b n)`: the last tokens of each prompt, without the special token that opens a text.
    `logp_mask (s b t-1)`: next tokens that are not padding. Padding is on the left: every text ends at index -1.
    """
    tokenizer.padding_side = "left"
    collated = PairCollator(tokenizer)(examples)
    batch = {name: rearrange(collated[name], "(s b) t -> s b t", s=4) for name in INPUTS}
    real = batch["attention_mask"].bool()
    text = real & (batch["input_ids"] != tokenizer.bos_token_id)
    return {**batch, "hs_mask": text[:3, :, -LAST_TOKENS:], "logp_mask": real[:, :, 1:] & real[:, :, :-1]}


def forward(model: PeftModel, batch: dict[str, Tensor], coefficients: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Read every text at every coefficient in one forward pass: each row of the batch has its own coefficient.

    Returns hidden states of the last tokens `(c s b n d)`, log-probabilities `(c s b t-1)` of the next tokens, and the
    logits `(c s b v)` after the last token.
    """
    c, (s, b, _) = len(coefficients), batch["input_ids"].shape
    rows = {name: repeat(batch[name], "s b t -> (c s b) t", c=c) for name in INPUTS}
    per_row = repeat(torch.tensor(coefficients), "c -> (c s b)", s=s, b=b)
    with steer(model, per_row), capture([decoder_layers(model)[-1]]) as outputs:
        logits = model(**rows).logits  # (r t v), where r = c s b
    logp = logits[:, :-1].log_softmax(dim=-1).gather(-1, rows["input_ids"][:, 1:, None]).squeeze(-1)
    hs, logp, ends = (
        rearrange(x, "(c s b) ... -> c s b ...", c=c, s=s) for x in (outputs[0][:, -LAST_TOKENS:], logp, logits[:, -1])
    )
    return hs, logp, ends


@torch.no_grad()
def make_reference(model: PeftModel, batch: dict[str, Tensor]) -> Reference:
    """Read all texts with the base model: at c = 0 the adapter does nothing. (With many pairs, do it in parts.)"""
    hs, logp, logits = (x[0] for x in forward(model, batch, [0.0]))
    hs, logits = hs[:3], logits[:3]

    # The direction is the first right singular vector of the differences between chosen and rejected.
    mask = batch["hs_mask"].float()
    means = einsum(hs, mask, "p b n d, p b n -> p b d") / reduce(mask, "p b n -> p b 1", "sum")
    differences = means[0] - means[1]  # (b d)
    direction = torch.linalg.svd(differences, full_matrices=False).Vh[:1].mT  # (d k)
    direction = direction * (differences @ direction).mean(dim=0).sign()
    scale = (differences @ direction).abs().mean(dim=0)  # (k)

    # The next tokens that one persona makes likelier than the other. The weights of each persona sum to 1.
    disagreement = logits[0].softmax(dim=-1) - logits[1].softmax(dim=-1)  # (b v)
    likelier = []
    for x in (disagreement.relu(), (-disagreement).relu()):
        top = x.topk(NEXT_TOKENS, dim=-1)
        kept = torch.zeros_like(x).scatter(-1, top.indices, top.values)
        likelier.append(kept / kept.sum(dim=-1, keepdim=True))
    next_weight = likelier[0] - likelier[1]
    gap = einsum(logits, next_weight, "p b v, b v -> p b")
    weight = disagreement.abs().sum(dim=-1) / 2  # (b) total variation
    unit = (weight * (gap[0] - gap[1])).sum() / weight.sum()
    return Reference(hs, logp, direction, scale, next_weight, gap, weight / weight.mean(), unit.item())


def loss_of(model: PeftModel, batch: dict[str, Tensor], ref: Reference, index: Tensor):
    """The loss of the pairs `index (b)`, at c = +1 and c = -1 in one forward pass."""
    batch = {name: x[:, index] for name, x in batch.items()}
    hs, logp, logits = forward(model, batch, [1.0, -1.0])
    mask, logp_ref = batch["logp_mask"], ref.logp[:, index]
    return inner_contrastive_loss(
        hs_pi=hs[:, :3],
        hs_ref=ref.hs[:, index],
        hs_mask=batch["hs_mask"],
        # Each persona's text must stay likely on its own side: chosen at plus, rejected at minus.
        logp_pi=torch.stack([logp[0, 0], logp[1, 1]]),
        logp_ref=logp_ref[:2],
        logp_mask=mask[:2],
        # The neutral text must stay likely on both sides.
        neutral_logp_pi=logp[:, 3],
        neutral_logp_ref=logp_ref[3],
        neutral_mask=mask[3],
        direction=ref.direction,
        scale=ref.scale,
        gap_pi=einsum(logits[:, :3], ref.next_weight[index], "c p b v, b v -> c p b"),
        gap_ref=ref.gap[:, index],
        gap_weight=ref.gap_weight[index],
        gap_unit=ref.gap_unit,
    )


def main(output_dir: str = "outputs/loop", steps: int = STEPS, ask_every: int = 1):
    """Train, evaluate, save. Returns the model, the loss of each step and the evaluation."""
    torch.manual_seed(SEED)
    base, tokenizer = tiny.load()
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    model.eval()  # no dropout: at c = 0 the policy must be the base model exactly
    pairs, neutral = tiny.pairs(TRAIT, PAIRS, seed=SEED), tiny.neutral_texts(PAIRS, seed=SEED)
    batch = make_batch(tokenize_examples(tokenizer, pairs, neutral, seed=SEED), tokenizer)
    ref = make_reference(model, batch)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0)
    losses = []
    for step in range(steps):
        index = torch.randperm(PAIRS)[:BATCH]
        result = loss_of(model, batch, ref, index)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        losses.append(result.loss.item())
        if step % 10 == 0 or step == steps - 1:
            terms = ", ".join(f"{name} {term.mean():.2f}" for name, term in result.terms.items())
            print(f"step {step:3d}: loss {losses[-1]:.2f} ({terms})")

    questions, unseen = tiny.questions(TRAIT, "held_out")[::ask_every], tiny.neutral_texts(32, seed=SEED + 1)
    report = evaluate(model, tokenizer, questions, lambda c: steer(model, c), [-1.0, 1.0], neutral_texts=unseen)
    for c, kl in zip(report.coefficients, report.kl.tolist(), strict=True):
        print(f"c = {c:+.0f}: log-odds {report.mean_log_odds(c):+.2f} nats, KL from the base {kl:.3f} nats per token")
    model.save_pretrained(output_dir)
    return model, losses, report


if __name__ == "__main__":
    main()
