"""A revision of a model on the hub, such as a checkpoint of its training: ``id@revision``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sinklens as sl
from sinklens.errors import InputError
from sinklens.models.view import model_id

pytestmark = pytest.mark.backend


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with two revisions of one model, whose weights all have one value: so have their logits."""
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32, num_key_value_heads=2, max_position_embeddings=32))
    place = tmp_path / "models--we--grown"
    (place / "refs").mkdir(parents=True)
    for number, revision in enumerate(("main", "step10")):
        with torch.no_grad():
            for weight in model.parameters():
                weight.fill_(0.1 * (number + 1))
        digest = str(number) * 40
        model.save_pretrained(place / "snapshots" / digest)
        (place / "refs" / revision).write_text(digest)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("hub")
def test_a_revision_is_the_one_that_was_asked_for() -> None:
    for name, value in (("we/grown", 0.1), ("we/grown@main", 0.1), ("we/grown@step10", 0.2)):
        model = sl.load_model(name)
        assert model_id(model) == name
        assert all(torch.all(weight == value) for weight in (model.embed.W_E, model.blocks[0].attn.W_Q))
    with pytest.raises(InputError, match=r"cannot load the model 'we/grown@step11'"):
        sl.load_model("we/grown@step11")
