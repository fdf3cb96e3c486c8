"""The lab's model computes what the Hugging Face class computes with the same weights, and starts as its seed says."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from equipoise.errors import ConfigError, InputError
from equipoise.lab.config.schema import ModelConfig
from equipoise.lab.models.hf_weights import architecture, from_hugging_face, hugging_face_config, to_hugging_face
from equipoise.lab.models.protocol import active_parameters
from equipoise.lab.models.transformer import LanguageModel

TINY = ModelConfig(layers=2, width=48, heads=4, kv_heads=2, head_dim=16, experts=8, top_k=3, expert_hidden=24,
                   vocab_size=300)  # fmt: skip


def randomized(config: ModelConfig, **options) -> LanguageModel:
    """A model with weights (norms and biases too) far from their initial values, so that no part can hide."""
    model = LanguageModel(config, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            mean = 1.0 if parameter.ndim == 1 else 0.0
            std = 0.3 if parameter.ndim == 1 else 1 / math.sqrt(parameter.shape[-1])
            parameter.normal_(mean, std, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.normal_(0.0, 0.2, generator=generator)
    return model


def random_tokens(shape=(2, 40), vocab_size=300) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(2))


HUGGING_FACE = {
    "softmax": {"gate": "softmax"},
    "softmax, weights not normalised": {"gate": "softmax", "normalize_weights": False},
    "softmax, tied, no grouped queries": {"gate": "softmax", "tie_embeddings": True, "kv_heads": 4},
    "softmax, other rotary base": {"gate": "softmax", "rope_theta": 500.0, "norm_eps": 1e-5},
    "sigmoid, bias, shared": {"gate": "sigmoid", "selection_bias": True, "shared_experts": 2, "weight_scale": 2.5},
    "sigmoid, bias, none shared": {"gate": "sigmoid", "selection_bias": True, "normalize_weights": False},
    "sigmoid, no bias, shared": {"gate": "sigmoid", "shared_experts": 1},
    "sigmoid, bias, groups": {"gate": "sigmoid", "selection_bias": True, "num_groups": 4, "top_groups": 2},
}


@pytest.mark.parametrize("options", HUGGING_FACE.values(), ids=HUGGING_FACE.keys())
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_logits_equal_those_of_the_hugging_face_class(options):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(TINY, **options)
    model = randomized(config).eval()
    settings = hugging_face_config(config, max_positions=64)
    settings |= {"attn_implementation": "eager", "experts_implementation": "eager"}
    theirs_class = getattr(transformers, architecture(config))
    theirs = theirs_class(theirs_class.config_class(**settings))
    state = to_hugging_face(model.state_dict(), config)
    theirs.load_state_dict(state, strict=True)
    tokens = random_tokens()
    with torch.no_grad():
        ours, expected = model(tokens), theirs.eval()(tokens).logits
    assert ours.std() > 0.5  # the comparison is about something
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)

    again = LanguageModel(config, seed=9)
    again.load_state_dict(from_hugging_face(theirs.state_dict(), config))
    assert torch.equal(again.eval()(tokens), ours)


def test_softmax_keys_are_those_of_qwen3_without_a_map():
    transformers = pytest.importorskip("transformers")
    settings = hugging_face_config(TINY, max_positions=64)
    theirs = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**settings))
    ours = {key: value.shape for key, value in LanguageModel(TINY).state_dict().items()}
    assert ours == {key: value.shape for key, value in theirs.state_dict().items()}


@pytest.mark.parametrize("options", [{"gate": "sqrt_softplus"}, {"shared_experts": 1}, {"selection_bias": True}])
def test_what_no_architecture_holds_is_refused(options):
    with pytest.raises(ConfigError, match="a Hugging Face architecture"):
        architecture(dataclasses.replace(TINY, **options))


def test_a_bias_is_not_lost_on_the_way_back():
    config = dataclasses.replace(TINY, gate="sigmoid", selection_bias=True)
    state = to_hugging_face(randomized(config).state_dict(), config)
    with pytest.raises(ConfigError, match="selection_bias=True"):
        from_hugging_face(state, dataclasses.replace(config, selection_bias=False))


@pytest.mark.parametrize("place", ["scores", "logits"])
def test_a_bias_of_a_class_has_no_place_in_the_file(place):
    config = dataclasses.replace(TINY, gate="sigmoid", selection_bias=True)
    model = randomized(config)
    router = next(module for module in model.modules() if hasattr(module, "enable_selection_bias"))
    router.enable_selection_bias(place, "image")
    with pytest.raises(ConfigError, match=r"one selection bias for all tokens(.|\n)*_of_image"):
        to_hugging_face(model.state_dict(), config)


def test_weights_depend_on_the_seed_and_their_name_only():
    base = dict(LanguageModel(TINY, seed=3).named_parameters())
    variants = [
        dataclasses.replace(TINY, gate="sigmoid", selection_bias=True),
        dataclasses.replace(TINY, shared_experts=1),
        dataclasses.replace(TINY, checkpointing="reentrant"),
    ]
    for config in variants:
        torch.manual_seed(hash(config) % 1000)  # the global generator has no say
        other = dict(LanguageModel(config, seed=3).named_parameters())
        assert all(torch.equal(other[name], weight) for name, weight in base.items())
    another = dict(LanguageModel(TINY, seed=4).named_parameters())
    assert not torch.equal(another["lm_head.weight"], base["lm_head.weight"])


def test_the_first_loss_is_that_of_knowing_nothing():
    tokens = random_tokens()
    loss = LanguageModel(TINY)(tokens, tokens.roll(-1, 1))
    assert abs(loss.item() - math.log(300)) < 0.1


def test_attention_is_causal():
    model = randomized(TINY).eval()
    tokens = random_tokens()
    changed = tokens.clone()
    changed[:, 25] = (changed[:, 25] + 1) % 300
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.allclose(before[:, 25:], after[:, 25:])


def test_loss_is_the_mean_over_valid_tokens():
    model = randomized(TINY)
    tokens, targets = random_tokens(), random_tokens((2, 40)).flip(0)
    mask = torch.arange(40) < torch.tensor([[40], [7]])
    with torch.no_grad():
        expected = F.cross_entropy(model(tokens, token_mask_BS=mask)[mask].double(), targets[mask])
        loss = model(tokens, targets, token_mask_BS=mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_no_valid_token_is_an_error():
    tokens = random_tokens()
    with pytest.raises(InputError, match="valid token"):
        LanguageModel(TINY)(tokens, tokens, token_mask_BS=torch.zeros(2, 40, dtype=torch.bool))
    with pytest.raises(InputError, match="at least one token"):
        LanguageModel(TINY)(tokens[:, :0])


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["reentrant", "non_reentrant"])
def test_recompute_changes_nothing(recompute, precision):
    tokens = random_tokens()

    def gradients(config):
        model = randomized(config, compute_dtype=precision)
        loss = model(tokens, tokens.roll(-1, 1))
        loss.backward()
        return loss, [parameter.grad for parameter in model.parameters()]

    loss, grads = gradients(TINY)
    again, again_grads = gradients(dataclasses.replace(TINY, checkpointing=recompute))
    assert torch.equal(loss, again)
    for grad, again_grad in zip(grads, again_grads, strict=True):
        torch.testing.assert_close(grad, again_grad, rtol=1e-6, atol=1e-7)


def test_bf16_is_close_to_fp32_and_keeps_fp32_weights_and_gradients():
    tokens = random_tokens((2, 200))
    wide, narrow = randomized(TINY), randomized(TINY, compute_dtype=torch.bfloat16)
    losses = [model(tokens, tokens.roll(-1, 1)) for model in (wide, narrow)]
    for loss in losses:
        loss.backward()
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=5e-3, atol=0)
    for parameter, reference in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        cosine = F.cosine_similarity(parameter.grad.flatten(), reference.grad.flatten(), dim=0)
        assert cosine > 0.95  # experts flip where two scores are close: 0.97 to 0.999 here


def test_long_sequences_in_bf16_use_the_other_kernel_with_the_same_result(monkeypatch):
    tokens = random_tokens((1, 64))
    model = randomized(TINY, compute_dtype=torch.bfloat16).eval()
    with torch.no_grad():
        short = model(tokens)
        monkeypatch.setattr("equipoise.lab.models.cpu_ops.attention.LONGEST", 63)
        long = model(tokens)
    assert not torch.equal(short, long)  # it was another kernel
    cosine = F.cosine_similarity(short.flatten(0, 1), long.flatten(0, 1), dim=-1)
    assert cosine.median() > 0.998


def test_parameter_counts():
    model = LanguageModel(TINY)
    per_expert = 3 * TINY.width * TINY.expert_hidden
    total = sum(parameter.numel() for parameter in model.parameters())
    assert active_parameters(model) == total - TINY.layers * (TINY.experts - TINY.top_k) * per_expert
