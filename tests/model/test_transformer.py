import pytest
import torch

from model.init import initial_value, initialise
from model.loss import cross_entropy
from model.transformer import Transformer, layer_builders
from tests.shapes import small


def built(config, seed=7):
    model = Transformer(config)
    initialise(model, "", seed, config.init_std)
    return model


def huggingface_twin(config, model):
    transformers = pytest.importorskip("transformers")
    twin = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.d_head,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )
    names = {
        "embedding.tokens.weight": "model.embed_tokens.weight",
        "head.norm.weight": "model.norm.weight",
        "head.proj.weight": "lm_head.weight",
    }
    for i in range(config.n_layers):
        for ours, theirs in [
            ("attention_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
            *[(f"attention.qkv.{p}_proj", f"self_attn.{p}_proj") for p in "qkv"],
            ("attention.o_proj", "self_attn.o_proj"),
            *[(f"ffn.gate_up.{p}_proj", f"mlp.{p}_proj") for p in ("gate", "up")],
            ("ffn.down_proj", "mlp.down_proj"),
        ]:
            names[f"blocks.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
    state = {names[name]: value for name, value in model.state_dict().items()}
    twin.load_state_dict(state, strict=True)
    return twin, names


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("changes", [{}, {"head_dim": 32, "rope_theta": 500.0, "norm_eps": 1e-4}], ids=["", "odd"])
def test_logits_and_gradients_are_those_of_transformers_llama(kv_heads, changes):
    config = small(kv_heads, max_seq_len=512, **changes)
    model = built(config)
    for name, parameter in model.named_parameters():  # norm weights of 1 would hide a norm left out
        if "norm" in name:
            parameter.data += torch.linspace(-0.3, 0.3, parameter.numel())
    twin, names = huggingface_twin(config, model)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (2, 400), generator=generator)
    labels = torch.randint(config.vocab_size, (2, 400), generator=generator)

    logits, theirs = model(tokens), twin(input_ids=tokens).logits
    torch.testing.assert_close(logits, theirs, rtol=1e-5, atol=1e-5)
    cross_entropy(logits, labels).mean.backward()
    torch.nn.functional.cross_entropy(theirs.flatten(0, 1), labels.flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[names[name]], rtol=1e-5, atol=1e-6, msg=name)


def test_the_list_of_layers_is_the_model():
    config = small()
    model = built(config)
    tokens = torch.arange(24).reshape(2, 12)
    x = tokens
    for name, build in layer_builders(config).items():
        layer = build()
        initialise(layer, f"{name}.", 7, config.init_std)
        x = layer(x)
        full = {f"{name}.{inner}" for inner, _ in layer.named_parameters()}
        assert full <= {whole for whole, _ in model.named_parameters()}
    assert torch.equal(x, model(tokens))


def test_the_same_seed_and_name_give_the_same_numbers_and_no_others_do():
    shape = torch.Size([40, 50])
    value = initial_value("blocks.0.ffn.gate_up.up_proj.weight", shape, 1, 0.006)
    assert torch.equal(value, initial_value("blocks.0.ffn.gate_up.up_proj.weight", shape, 1, 0.006))
    assert not torch.equal(value, initial_value("blocks.1.ffn.gate_up.up_proj.weight", shape, 1, 0.006))
    assert not torch.equal(value, initial_value("blocks.0.ffn.gate_up.up_proj.weight", shape, 2, 0.006))
    assert abs(value.std().item() / 0.006 - 1) < 0.1 and abs(value.mean().item()) < 0.001


def test_every_parameter_is_initialised():
    config = small()
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    initialise(model, "", 1, config.init_std)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert torch.equal(parameter, torch.ones_like(parameter)) == ("norm" in name), name


def test_bf16_does_not_touch_the_rotary_angles():
    config = small(max_seq_len=2048, n_layers=1)
    model = built(config).bfloat16()
    tokens = torch.randint(config.vocab_size, (1, 2048), generator=torch.Generator().manual_seed(0))
    exact = built(config)
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    got, want = model(tokens).float(), exact(tokens)
    # angles taken in bf16 would be off by whole turns at such positions
    assert (got - want)[0, -64:].norm() / want[0, -64:].norm() < 0.02


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
def test_in_bf16_logits_are_as_near_to_the_exact_ones_as_those_of_transformers(kv_heads):
    config = small(kv_heads, max_seq_len=512)
    model = Transformer(config)
    initialise(model, "", 7, 0.1)
    rounded = {name: value.bfloat16().float() for name, value in model.state_dict().items()}
    model.load_state_dict(rounded)
    twin, _ = huggingface_twin(config, model)
    tokens = torch.randint(config.vocab_size, (2, 400), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = model.double()(tokens)
        ours = model.bfloat16()(tokens).double()
        theirs = twin.bfloat16()(input_ids=tokens).logits.double()
    own, other = ((one - exact).norm() / exact.norm() for one in (ours, theirs))
    assert own < 0.02 and own < 1.1 * other
    assert (ours - theirs).norm() / exact.norm() < 1.5 * other


def test_ignored_labels_cost_nothing_and_are_not_counted():
    logits = torch.randn(2, 8, 30, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16).reshape(2, 8)
    full = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").reshape(2, 8)
    torch.testing.assert_close(cross_entropy(logits, labels).mean.float(), full.mean())
    labels[1] = -100
    loss = cross_entropy(logits, labels)
    torch.testing.assert_close((loss.total / 16).float(), full[0].sum() / 16)
    torch.testing.assert_close(loss.mean.float(), full[0].mean())
