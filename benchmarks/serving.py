"""Speed of requests at many coefficients, compared with one: `python -m benchmarks.serving --model smollm2`

`--shape qwen3-0.6b` uses random weights of that shape instead (bf16 on a GPU). All rows of the table generate the same
number of tokens greedily for the same prompts. The rows are: transformers with the base model, without steering; a
LoRA of PEFT at 1, without this package; and this package's server with all requests at 0, all at 1, and each request
at a different coefficient.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from peft import LoraConfig, get_peft_model
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from benchmarks.steps import SHAPES, random_model
from repeng import load_model
from repeng._command import command
from repeng.eval.report.tables import markdown
from repeng.serve import Batching, Dials, Limits
from repeng.serve.sampling import Sampling

SITES = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def with_lora(model: PreTrainedModel, r: int) -> PreTrainedModel:
    """The model with a LoRA named "own". It changes the model very little but takes as much time as any LoRA."""
    adapted = get_peft_model(model, LoraConfig(r=r, target_modules=SITES), adapter_name="own")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-3)
    adapted.requires_grad_(False)
    return model.eval()


def served(model: PreTrainedModel, prompts: Sequence[list[int]], coefficients: Sequence[float], n: int) -> float:
    """Seconds for one answer per prompt, each at its coefficient, with this package's server."""
    batching = Batching(Dials(model, {"own": "own"}), Limits(max_concurrent=len(prompts), max_length=512))
    batching.ends = set()

    async def answer(ids: list[int], c: float) -> int:
        found = [new async for new in batching.generate(ids, {"own": c}, n, Sampling(temperature=0))]
        return sum(len(new.ids) for new in found)

    async def together() -> list[int]:
        return await asyncio.gather(*map(answer, prompts, coefficients))

    batching.start()
    try:
        asyncio.run(together())  # warm-up: the first call allocates memory
        start = time.perf_counter()
        assert asyncio.run(together()) == [n] * len(prompts)
        return time.perf_counter() - start
    finally:
        batching.stop()


def by_transformers(model: PreTrainedModel, prompts: Sequence[list[int]], n: int) -> float:
    """Seconds for the same answers with transformers' continuous batching alone, set up as in this package."""
    concurrent = len(prompts)
    config = ContinuousBatchingConfig(
        allow_block_sharing=False,
        use_async_batching=False,
        use_cuda_graph=False,
        num_blocks=2 * concurrent,
        max_batch_tokens=256 if model.device.type == "cpu" else 2048,
        max_requests_per_batch=concurrent,
    )
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=n)
    with model.continuous_batching_context_manager(greedy, continuous_batching_config=config) as manager:
        took = 0.0
        for _ in range(2):
            start, left = time.perf_counter(), set(manager.add_requests([*prompts], max_new_tokens=n))
            while left:
                result = manager.get_result(timeout=1)
                if not manager.is_running():
                    raise RuntimeError("transformers stopped generating; see its log for the reason")
                if result is not None and result.is_finished():
                    left.discard(result.request_id)
            took = time.perf_counter() - start
        return took


def by_generate(model: PreTrainedModel, prompts: Sequence[list[int]], n: int) -> float:
    """Seconds for the same answers with one call of `generate`, where all answers begin and end together."""
    ids = torch.tensor([*prompts], device=model.device)
    options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
    took = 0.0
    for _ in range(2):
        start = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        took = time.perf_counter() - start
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="value of model_name_or_path")
    parser.add_argument("--shape", choices=SHAPES, help="use random weights of this shape instead")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="tokens per prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens per answer")
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def fresh() -> PreTrainedModel:
        return random_model(options.shape, device) if options.shape else load_model(options.model, device=device)[0]

    plain, adapted = fresh().eval(), with_lora(fresh(), options.rank)
    drawn = torch.Generator().manual_seed(0)
    vocabulary = plain.config.vocab_size
    prompts = torch.randint(5, vocabulary, (options.requests, options.prompt), generator=drawn).tolist()
    many = [(-1) ** n * (0.1 + n / len(prompts)) for n in range(len(prompts))]
    ways: dict[str, Callable[[], float]] = {
        "transformers' continuous batching, base": lambda: by_transformers(plain, prompts, options.new),
        "generate, base, all at once": lambda: by_generate(plain, prompts, options.new),
        "generate, LoRA of PEFT at 1": lambda: by_generate(adapted, prompts, options.new),
        "served, all at 0": lambda: served(adapted, prompts, [0.0] * len(prompts), options.new),
        "served, all at 1": lambda: served(adapted, prompts, [1.0] * len(prompts), options.new),
        "served, each at its own": lambda: served(adapted, prompts, many, options.new),
    }
    found = {name: [way() for _ in range(options.repeats)] for name, way in ways.items()}
    first = statistics.median(next(iter(found.values())))
    tokens = options.requests * options.new
    rows = {
        name: {
            "tokens/s": f"{tokens / statistics.median(each):.0f}",
            "times the first": f"{first / statistics.median(each):.2f}",
        }
        for name, each in found.items()
    }
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(markdown(rows, first=f"{options.shape or options.model}, {options.requests} requests, {where}"))


if __name__ == "__main__":
    with command():
        main()
