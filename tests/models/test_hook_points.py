"""Hook points: found once in a call, hooked as TransformerLens hooks them, and let go of in any case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens import edits, sites
from sinklens.engine.run import run_patches
from sinklens.errors import EngineError
from sinklens.models.state import usual_state
from sinklens.models.view import check_hook_name, has_hook, hook_points_kept, hooked, is_bridge, without_hooks
from sinklens.patches import Patch
from sinklens.prompts import from_tokens
from sinklens.readouts import attention_received
from tests.helpers.tiny import BACKENDS, hooks_left, tiny_model, tiny_tokens

pytestmark = pytest.mark.backend
NAMES = ("hook_embed", "blocks.0.hook_resid_pre", "blocks.1.attn.hook_pattern", "blocks.2.hook_mlp_out")


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model("llama", request.param)


def halved(act: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
    return act / 2


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(tiny_tokens(2, 6), return_type="logits")


def test_hooks_do_what_transformer_lens_s_do(model: Any) -> None:
    hooks = [(name, halved) for name in NAMES]
    plain = logits(model)
    with model.hooks(fwd_hooks=hooks):
        expected = logits(model)
    with hooked(model, hooks):
        assert len(hooks_left(model)) >= len(NAMES)
        found = logits(model)
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
    assert torch.equal(logits(model), plain)
    assert not hooks_left(model)


def test_somebodys_hooks_stay_and_come_first(model: Any) -> None:
    seen: list[str] = []
    with model.hooks(fwd_hooks=[(NAMES[1], lambda act, hook: seen.append("theirs"))]):  # noqa: ARG005
        with hooked(model, [(NAMES[1], lambda act, hook: seen.append("ours"))]):  # noqa: ARG005
            logits(model)
        logits(model)
        with without_hooks(model), hooked(model, [(NAMES[1], lambda act, hook: seen.append("alone"))]):  # noqa: ARG005
            logits(model)
        logits(model)
    assert seen == ["theirs", "ours", "theirs", "alone", "theirs"]
    assert not hooks_left(model)


def test_no_hook_outlives_an_exception(model: Any) -> None:
    level = getattr(model, "context_level", 0)
    with pytest.raises(ZeroDivisionError), hooked(model, [(name, halved) for name in NAMES]):
        raise ZeroDivisionError
    assert not hooks_left(model)
    with pytest.raises((EngineError, KeyError)), hooked(model, [(NAMES[0], halved), ("blocks.0.no_hook", halved)]):
        pass
    assert not hooks_left(model)
    assert getattr(model, "context_level", 0) == level


def test_what_a_setting_leaves_out_is_refused(model: Any) -> None:
    if not is_bridge(model):
        pytest.skip("a HookedTransformer asserts it by itself")
    with pytest.raises(ValueError, match="set_use_attn_result"), hooked(model, [("blocks.0.attn.hook_result", halved)]):
        pass
    assert not hooks_left(model)


@pytest.mark.slow
def test_a_bridge_s_names_are_looked_up_once_in_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many hooks, patches and passes there are; the table takes a bridge a pass's time and more."""
    model = tiny_model("llama", "bridge")
    made: list[int] = []
    kind = type(model)
    table = kind.hook_dict.fget
    monkeypatch.setattr(kind, "hook_dict", property(lambda self: made.append(1) or table(self)))
    batch = from_tokens(model, tiny_tokens(2, 8))
    readouts = [attention_received("received", (1, 2, 3), (0,), batch.n)]
    patches = [Patch(sites.RESID_POST, (layer,), (2,), edits.Constant()) for layer in range(3) for _ in range(2)]
    run_patches(model, batch, patches[:1], readouts)  # what is learnt of a model is learnt once
    made.clear()
    run_patches(model, batch, patches, readouts, max_rows=2)
    assert len(made) <= 2  # when the runner is made, and when it runs


def test_names_are_looked_up_anew_in_the_next_call(tiny_bridge: Any) -> None:
    name = "blocks.0.hook_resid_pre"
    with usual_state(tiny_bridge):
        assert has_hook(tiny_bridge, name)
        assert not has_hook(tiny_bridge, "blocks.0.hook_new")
    tiny_bridge._hook_registry["blocks.0.hook_new"] = tiny_bridge.hook_dict[name]
    try:
        with usual_state(tiny_bridge):
            check_hook_name(tiny_bridge, "blocks.0.hook_new")
        check_hook_name(tiny_bridge, "blocks.0.hook_new")
    finally:
        del tiny_bridge._hook_registry["blocks.0.hook_new"]
    with pytest.raises(EngineError, match="did you mean"), hook_points_kept(tiny_bridge):
        check_hook_name(tiny_bridge, "blocks.0.hook_new")
