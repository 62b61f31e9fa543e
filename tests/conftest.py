import copy
import os

import pytest
import torch
from peft import get_peft_model

from repeng import SvdSteeringConfig, tiny

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]


@pytest.fixture(scope="session", autouse=True)
def two_threads_together():
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What tests keep is gone with them; their processes inherit the place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPENG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def embedded():
    """The embedded model and tokenizer; tests must not change them."""
    return tiny.load()


@pytest.fixture
def base(embedded):
    """A copy of the embedded model that a test may change."""
    return copy.deepcopy(embedded[0])


@pytest.fixture(scope="session")
def tokenizer(embedded):
    return embedded[1]


@pytest.fixture
def steered(base):
    """The embedded model with an adapter that does something at c ≠ 0."""
    torch.manual_seed(1)
    config = SvdSteeringConfig(
        r=8, target_modules=TARGETS, layers_to_transform=[1, 2], rotate_output=True, init_weights=False
    )
    return get_peft_model(base, config).eval()


@pytest.fixture(scope="session")
def batch(tokenizer):
    """Token ids of four equally long prompts."""
    texts = ["the speaker is honest .", "the speaker is gloomy .", "two plus three is", "the rain settles on"]
    ids = [tokenizer(text)["input_ids"][:5] for text in texts]
    return torch.tensor(ids)
