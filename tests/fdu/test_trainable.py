"""The training methods: what each changes, the frozen model beside it, and that it goes without a trace."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import families
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoKrConfig, LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fdu.config import TRAIN_METHODS
from fdu.models import parts
from fdu.models.denoiser import Conditioning, Denoiser
from fdu.models.families import denoiser_of
from fdu.subjects.digits import pipeline as digits
from fdu.training.methods import Request, Trainable, attach

pytestmark = pytest.mark.quick(family=["sd", "sd3"], method=["lora", "cross_attention", "token"])

TRAINED = [name for name, method in TRAIN_METHODS.items() if method.trains]
ADAPTER_METHODS = [name for name in TRAINED if TRAIN_METHODS[name].result != "weights"]
VARIANTS = ("sd_v", "flux_guidance")
"""Pipelines of a family that stands here already."""
FAMILIES = tuple(name for name in families.FAMILY_NAMES if name not in VARIANTS)
KINDS = ("lora", "dora", "cross_attention", "full", "token")
"""Methods that differ in how they work, not only in which weights they take."""
WEIGHT_METHODS = ("text", "cross_attention", "attention", "full", "text_encoder")
TARGET, ANCHOR = "a photo of the digit three", "a photo of the digit eight"


def wrapped(pipeline: DiffusionPipeline) -> Denoiser:
    frames = families.FRAMES["wan"] if type(pipeline).__name__ == "WanPipeline" else None
    return denoiser_of(pipeline, 16 if has_no_size(pipeline) else None, frames)


def has_no_size(pipeline: DiffusionPipeline) -> bool:
    """Whether a pipeline draws at a size of its own, whatever the model."""
    return type(pipeline).__name__ in (
        "Flux2Pipeline",
        "Flux2KleinPipeline",
        "FluxPipeline",
        "ChromaPipeline",
        "QwenImagePipeline",
        "WanPipeline",
        "ZImagePipeline",
    )


def attached(denoiser: Denoiser, method: str, **settings: Any) -> Trainable:
    request: dict[str, Any] = {"rank": 2, "target_names": ["three"], "prompts": [TARGET], "kept_prompts": [ANCHOR]}
    return attach(denoiser, Request(method, lora_alpha=2.0, **{**request, **settings}))


def predicted(denoiser: Denoiser, prompt: str = TARGET) -> Tensor:
    """What the pipeline computes from a prompt, text encoders and all."""
    noisy = torch.randn(1, *denoiser.latent_shape, generator=torch.Generator().manual_seed(1))
    noisy = noisy.to(next(denoiser.module.parameters()).dtype)
    return denoiser.predict(noisy, torch.tensor([500]), denoiser.encode_batch([prompt]))


@torch.no_grad()
def output(denoiser: Denoiser, prompt: str = TARGET) -> Tensor:
    return predicted(denoiser, prompt)


def step(denoiser: Denoiser, trainable: Trainable, weight_decay: float = 0.1) -> None:
    parameters = list(trainable.named_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=weight_decay)
    predicted(denoiser).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(denoiser: Denoiser, method: str, **settings: Any) -> Trainable:
    """An erasure after two steps (the first moves but one of two LoRA matrices), finished."""
    trainable = attached(denoiser, method, **settings)
    for _ in range(2):
        step(denoiser, trainable)
    trainable.finish()
    return trainable


def weights(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parts.weights(pipeline).items()}


def trace(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """All that an erasure could leave behind in the models, which have run before: transformers hooks some then."""
    found: dict[str, Any] = {}
    for attribute, model in parts.models(pipeline).items():
        for name, module in model.named_modules():
            hooks = (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            found[f"{attribute}.{name}"] = (type(module), sorted(vars(module)), module.training, hooks)
            if isinstance(module, BaseTunerLayer):
                found[f"{attribute}.{name} adapters"] = (
                    list(module.active_adapters),
                    module.disable_adapters,
                    list(module.merged_adapters),
                )
        for name, parameter in model.named_parameters():
            found[f"{attribute}.{name} value"] = (id(parameter), parameter.requires_grad, parameter.dtype)
            found[f"{attribute}.{name} bits"] = parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()
        found[f"{attribute} configs"] = sorted(getattr(model, "peft_config", {}))
    return found


@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_method_changes_what_it_names_and_goes_without_a_trace(family: str, method: str) -> None:
    pipeline = families.build(family)
    denoiser = wrapped(pipeline)
    former = output(denoiser)
    before, values = trace(pipeline), weights(pipeline)
    trainable = attached(denoiser, method)
    named = trainable.named_parameters()
    assert named and all(parameter.dtype == torch.float32 for parameter in named.values())
    flags = [parameter for model in parts.models(pipeline).values() for parameter in model.parameters()]
    assert {id(p) for p in flags if p.requires_grad} == {id(p) for p in named.values() if method != "token"}

    step(denoiser, trainable)
    step(denoiser, trainable)
    assert not torch.equal(output(denoiser), former)
    with trainable.frozen():
        assert torch.equal(output(denoiser), former)
    trainable.finish()
    after = output(denoiser)
    assert not torch.equal(after, former)
    with trainable.frozen():
        assert torch.equal(output(denoiser), former)
    assert torch.equal(output(denoiser), after)
    changed = {name for name, value in weights(pipeline).items() if not torch.equal(value, values[name])}
    assert changed or method in ADAPTER_METHODS
    assert all(belongs(name, method, denoiser) for name in changed)
    assert trainable.trains_text == (method in ("text_encoder", "token"))

    trainable.remove()
    assert trace(pipeline) == before
    assert torch.equal(output(denoiser), former)


@pytest.mark.parametrize("method", ADAPTER_METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_go_on_the_layers_that_the_settings_choose(family: str, method: str) -> None:
    denoiser = wrapped(families.build(family))
    for choice, endings in denoiser.layer_groups().items():
        trainable = attached(denoiser, method, adapter_layers=choice)
        found = {name.split(".lora_")[0].partition(".")[2] for name in trainable.named_parameters()}
        assert found == {name for name in parts.layers(denoiser.module) if parts.ends_with(name, endings)}
        trainable.remove()


@pytest.mark.parametrize("method", ["lora", "text"])
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_no_part_of_the_prompt_escapes_the_training(family: str, method: str) -> None:
    """Two prompts of the same embeddings, whose pooled embeddings differ: the layers that read the prompt can make one
    draw what the other does, and its keys and values alone cannot."""
    denoiser = wrapped(families.build(family))
    read = denoiser.encode(["a cat", "a dog"]).tensors
    both = Conditioning({**read, "embeddings": read["embeddings"][:1].repeat(2, 1, 1)})
    target, anchor = both[:1], both[1:]
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(6, *denoiser.latent_shape, generator=generator)
    indices = torch.linspace(100, 900, 6).long()
    with torch.no_grad():
        wanted = denoiser.predict(noisy, indices, Conditioning.cat([anchor] * 6))

    def left(named: str, choice: str, steps: int = 60) -> float:
        trainable = attached(denoiser, named, adapter_layers=choice)
        optimizer = torch.optim.Adam(trainable.named_parameters().values(), lr=0.01)
        errors = []
        for _ in range(steps):
            error = (denoiser.predict(noisy, indices, Conditioning.cat([target] * 6)) - wanted).square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            errors.append(float(error))
        trainable.remove()
        return errors[-1] / errors[0]

    assert left(method, "text") < 0.02
    assert left("lora" if method == "lora" else "cross_attention", "cross_attention") > 0.1


def belongs(name: str, method: str, denoiser: Denoiser) -> bool:
    """Whether a method may change a weight."""
    attribute, _, rest = name.partition(".")
    layer = rest.rpartition(".")[0]
    return {
        "text": attribute == denoiser.module_name and layer.endswith(denoiser.layer_groups()["text"]),
        "cross_attention": attribute == denoiser.module_name and layer.endswith(denoiser.context_projections),
        "attention": attribute == denoiser.module_name and layer.endswith(denoiser.attention_projections),
        "full": attribute == denoiser.module_name,
        "text_encoder": attribute.startswith("text_encoder"),
        "token": attribute.startswith("text_encoder") and layer.endswith(("token_embedding", "shared", "embed_tokens")),
    }.get(method, False)


@pytest.mark.parametrize("method", TRAINED)
def test_an_erasure_under_way_is_undone_too(method: str) -> None:
    pipeline = digits.load_pipeline()
    denoiser = wrapped(pipeline)
    before = trace(pipeline)
    trainable = attached(denoiser, method)
    step(denoiser, trainable)
    trainable.remove()
    assert trace(pipeline) == before
    trainable.remove()
    trainable.finish()
    with trainable.frozen():
        assert trace(pipeline) == before


@pytest.mark.parametrize("method", TRAINED)
def test_frozen_may_be_nested_and_survives_errors(method: str) -> None:
    denoiser = wrapped(families.build("sd"))
    former = output(denoiser)
    trainable = attached(denoiser, method)
    for finished in (False, True):
        if finished:
            trainable.finish()
        else:
            step(denoiser, trainable)
        after = output(denoiser)
        with pytest.raises(KeyError), trainable.frozen():
            with trainable.frozen():
                assert torch.equal(output(denoiser), former)
            assert torch.equal(output(denoiser), former)
            raise KeyError
        assert torch.equal(output(denoiser), after) and not torch.equal(after, former)
        named = trainable.named_parameters()
        assert all(parameter.requires_grad != finished for parameter in named.values()) or method in WEIGHT_METHODS


@pytest.mark.parametrize(("first", "second"), list(itertools.product(KINDS, KINDS)))
@pytest.mark.quick(first=["lora", "cross_attention"], second=["lora", "cross_attention", "token"])
def test_erasures_lie_on_each_other(first: str, second: str) -> None:
    pipeline = families.build("sd")
    denoiser = wrapped(pipeline)
    before, bits = output(denoiser), trace(pipeline)
    lower = trained(denoiser, first)
    between, between_bits = output(denoiser), trace(pipeline)
    upper = trained(denoiser, second)
    after = output(denoiser)
    assert not torch.equal(before, between) and not torch.equal(between, after)
    with upper.frozen():
        assert torch.equal(output(denoiser), between)
    with lower.frozen():
        assert torch.equal(output(denoiser), before)
    assert torch.equal(output(denoiser), after)
    with pytest.raises(RuntimeError, match="on top.*one; remove.*one first"):
        lower.remove()
    upper.remove()
    assert torch.equal(output(denoiser), between) and trace(pipeline) == between_bits
    lower.remove()
    assert torch.equal(output(denoiser), before) and trace(pipeline) == bits


@pytest.mark.parametrize("method", TRAINED)
def test_names_do_not_depend_on_what_the_pipeline_carries(method: str) -> None:
    plain, carrying = wrapped(families.build("sd")), wrapped(families.build("sd"))
    trained(carrying, "lora")
    assert list(attached(plain, method).named_parameters()) == list(attached(carrying, method).named_parameters())


def test_an_earlier_erasure_needs_the_later_ones_to_be_switched_off() -> None:
    denoiser = wrapped(families.build("sd"))
    lower = trained(denoiser, "cross_attention")
    trained(denoiser, "lora")
    gc.collect()
    with pytest.raises(RuntimeError, match="discarded"), lower.frozen():
        pass


def test_a_result_that_is_gone_costs_no_memory() -> None:
    pipeline = families.build("sd")
    original = next(pipeline.unet.parameters())
    trained(wrapped(pipeline), "full")
    gc.collect()
    assert original is not next(pipeline.unet.parameters())
    assert len(gc.get_referrers(original)) <= 1  # this function's frame


def test_one_erasure_is_trained_at_a_time() -> None:
    denoiser = wrapped(families.build("sd"))
    trainable = attached(denoiser, "lora")
    with pytest.raises(RuntimeError, match="call its finish"):
        attached(denoiser, "lora")
    trainable.finish()
    attached(denoiser, "lora")


def add_active(pipeline: DiffusionPipeline) -> None:
    pipeline.unet.add_adapter(adapter_config("attn2.to_k", "attn1.to_q"), "mine")


def add_inactive(pipeline: DiffusionPipeline) -> None:
    pipeline.unet.add_adapter(adapter_config("attn2.to_k", "attn2.to_v"), "other")
    add_active(pipeline)


def add_disabled(pipeline: DiffusionPipeline) -> None:
    add_active(pipeline)
    pipeline.disable_lora()


def add_fused(pipeline: DiffusionPipeline) -> None:
    add_active(pipeline)
    pipeline.fuse_lora()


def add_fused_and_unloaded(pipeline: DiffusionPipeline) -> None:
    add_fused(pipeline)
    pipeline.unload_lora_weights()


def add_fused_then_disabled(pipeline: DiffusionPipeline) -> None:
    add_fused(pipeline)
    pipeline.disable_lora()


def add_lokr(pipeline: DiffusionPipeline) -> None:
    config = LoKrConfig(r=2, alpha=2, target_modules=["attn2.to_k", "attn1.to_q"], init_weights=False)
    pipeline.unet.add_adapter(config, "kronecker")


def add_to_the_text_encoder(pipeline: DiffusionPipeline) -> None:
    pipeline.text_encoder.add_adapter(adapter_config("q_proj"), "text")


def adapter_config(*targets: str) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), init_lora_weights=False)


CARRIED = (
    ("lora", add_active),
    ("lora", add_inactive),
    ("lora", add_disabled),
    ("lora", add_fused),
    ("lora", add_fused_and_unloaded),
    ("lora", add_fused_then_disabled),
    ("lora", add_lokr),
    ("lora", add_to_the_text_encoder),
    ("dora", add_inactive),
    ("dora", add_fused),
    ("dora", add_lokr),
    ("cross_attention", add_inactive),
    ("cross_attention", add_fused),
    ("full", add_lokr),
    ("token", add_active),
    ("token", add_to_the_text_encoder),
)
"""Methods, each with the kinds of adapters that it could meet in a layer of its own."""


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize(("method", "add"), CARRIED)
def test_adapters_of_the_user_stay_as_they_are(method: str, add: Callable[[DiffusionPipeline], None]) -> None:
    pipeline = families.build("sd")
    add(pipeline)
    denoiser = wrapped(pipeline)
    former = output(denoiser)  # where a fused adapter is disabled, this is what unfuses it
    before, values = trace(pipeline), weights(pipeline)
    trainable = attached(denoiser, method)
    step(denoiser, trainable)
    step(denoiser, trainable)
    with trainable.frozen():
        assert torch.equal(output(denoiser), former)
    trainable.finish()
    after = output(denoiser)
    assert not torch.equal(after, former)
    with trainable.frozen():
        assert torch.equal(output(denoiser), former)
    assert torch.equal(output(denoiser), after)
    now = parts.weights(pipeline)
    changed = {name for name, value in values.items() if not torch.equal(value, now[name])}
    assert all(belongs(name, method, denoiser) for name in changed)
    trainable.remove()
    assert trace(pipeline) == before
    assert torch.equal(output(denoiser), former)


def test_what_is_fused_and_disabled_counts_as_what_the_next_pass_makes_of_it() -> None:
    first, second = families.build("sd"), families.build("sd")
    for pipeline in (first, second):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            add_fused_then_disabled(pipeline)
    trainable = attached(wrapped(first), "lora")
    with trainable.frozen():
        assert torch.equal(output(wrapped(first)), output(wrapped(second)))


def test_adapters_that_the_user_switches_afterwards_stay_switched() -> None:
    pipeline = families.build("sd")
    denoiser = wrapped(pipeline)
    plain = output(denoiser)
    add_active(pipeline)
    trainable = trained(denoiser, "lora")
    pipeline.set_adapters(["fdu"])
    with trainable.frozen():
        assert torch.equal(output(denoiser), plain)
    pipeline.set_adapters(["mine", "fdu"])
    trainable.remove()
    assert pipeline.get_active_adapters() == ["mine"]


def test_adapters_have_names_of_their_own() -> None:
    pipeline = families.build("sd")
    denoiser = wrapped(pipeline)
    for _ in range(3):
        trained(denoiser, "lora")
    assert pipeline.get_active_adapters() == ["fdu", "fdu_2", "fdu_3"]


def test_a_fused_erasure_says_so() -> None:
    pipeline = families.build("sd")
    trainable = trained(wrapped(pipeline), "lora")
    pipeline.fuse_lora()
    with pytest.raises(RuntimeError, match="'fdu'.*fused.*unfuse_lora"), trainable.frozen():
        pass
    with pytest.raises(RuntimeError, match="'fdu'.*fused.*unfuse_lora"):
        trainable.remove()
    pipeline.unfuse_lora()
    trainable.remove()


@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("family", ["sd", "sana"])
def test_half_precision_models_train_in_full_precision(family: str, method: str) -> None:
    pipeline = families.build(family).to(dtype=torch.bfloat16)
    denoiser = wrapped(pipeline)
    dtypes = {name: parameter.dtype for name, parameter in parts.weights(pipeline).items()}
    plain = output(denoiser)
    trainable = attached(denoiser, method)
    with trainable.frozen():
        assert torch.equal(output(denoiser), plain)
        with torch.autocast("cpu", torch.bfloat16):
            former = output(denoiser)
    if method in ADAPTER_METHODS:
        assert torch.equal(output(denoiser), plain)
    named = trainable.named_parameters()
    starts = {name: parameter.detach().clone() for name, parameter in named.items()}
    optimizer = torch.optim.AdamW(named.values(), lr=1e-2)
    for _ in range(2):
        # One autocast context around all passes: its cache of cast weights must not mix the two models up.
        with torch.autocast("cpu", torch.bfloat16):
            with trainable.frozen():
                assert torch.equal(output(denoiser), former)
            loss = predicted(denoiser).square().mean()
            with trainable.frozen():
                assert torch.equal(output(denoiser), former)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(output(denoiser), former)
    assert all(parameter.dtype == torch.float32 for parameter in named.values())
    assert any(not torch.equal(parameter, starts[name]) for name, parameter in named.items())
    trainable.finish()
    assert all(parameter.dtype == torch.bfloat16 for parameter in named.values() if method != "token")
    assert {name: parameter.dtype for name, parameter in parts.weights(pipeline).items()} == dtypes
    with trainable.frozen():
        assert torch.equal(output(denoiser), plain)
    assert output(denoiser).isfinite().all()


@pytest.mark.parametrize("method", TRAINED)
def test_steps_below_the_resolution_of_half_precision_add_up(method: str) -> None:
    denoiser = wrapped(families.build("sd").to(dtype=torch.bfloat16))
    trainable = attached(denoiser, method)
    name, parameter = next(iter(trainable.named_parameters().items()))
    start = parameter.detach().clone()
    with torch.no_grad():
        for _ in range(1000):
            parameter += 1e-6
    torch.testing.assert_close(parameter.detach(), start + 1e-3, rtol=1e-2, atol=1e-5, msg=name)


@pytest.mark.parametrize("method", TRAINED)
def test_frozen_between_forward_and_backward_leaves_the_gradient_right(method: str) -> None:
    gradients = []
    for frozen_between, recompute in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        denoiser = wrapped(families.build("sd"))
        if recompute:
            denoiser.module.enable_gradient_checkpointing()
            denoiser.pipeline.text_encoder.activation_checkpointing_enable()
        trainable = attached(denoiser, method)
        with torch.no_grad():
            for parameter in trainable.named_parameters().values():
                parameter += 0.1
        loss = predicted(denoiser).square().mean()
        if frozen_between:
            with trainable.frozen():
                output(denoiser)
        loss.backward()
        gradients.append([p.grad for p in trainable.named_parameters().values()])
    assert any(gradient is not None and gradient.any() for gradient in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0], msg=lambda words: f"with recomputed activations: {words}")


@pytest.mark.parametrize("method", TRAINED)
def test_flags_of_the_user_come_back(method: str) -> None:
    pipeline = families.build("sd")
    denoiser = wrapped(pipeline)
    flags = {}
    for number, (name, parameter) in enumerate(parts.weights(pipeline).items()):
        parameter.requires_grad_(number % 3 == 0)
        flags[name] = number % 3 == 0
    pipeline.vae.requires_grad_(False)
    for end in ("finish", "remove"):
        trainable = attached(denoiser, method)
        assert not any(p.requires_grad for p in pipeline.vae.parameters())
        getattr(trainable, end)()
        assert {name: p.requires_grad for name, p in parts.weights(pipeline).items()} == flags
        with trainable.frozen():
            pass
        assert {name: p.requires_grad for name, p in parts.weights(pipeline).items()} == flags
    unused = weakref.ref(next(pipeline.vae.parameters()))
    pipeline.vae = None
    gc.collect()
    assert unused() is None, "an erasure that is over holds no parameters that it did not train"


@pytest.mark.parametrize("method", TRAINED)
def test_training_mode_stays(method: str) -> None:
    pipeline = families.build("sd")
    for model in parts.models(pipeline).values():
        model.train()
    trainable = attached(wrapped(pipeline), method)
    with trainable.frozen():
        pass
    trainable.finish()
    models = parts.models(pipeline).values()
    assert all(module.training for model in models for module in model.modules())


@pytest.mark.parametrize("method", TRAINED)
def test_the_original_follows_a_pipeline_to_another_dtype(method: str) -> None:
    pipeline, plain = families.build("sd"), families.build("sd").to(dtype=torch.float64)
    denoiser = wrapped(pipeline)
    trainable = trained(denoiser, method)
    pipeline.to(dtype=torch.float64)
    with trainable.frozen():
        assert torch.equal(output(denoiser), output(wrapped(plain)))
    trainable.remove()
    assert torch.equal(output(denoiser), output(wrapped(plain)))


@pytest.mark.parametrize("method", ADAPTER_METHODS)
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_the_layers_of_an_adapter_load_in_plain_diffusers(family: str, method: str) -> None:
    pipeline, plain = families.build(family), families.build(family)
    denoiser = wrapped(pipeline)
    trained(denoiser, method)
    trainable = trained(denoiser, method)
    (attribute,) = trainable.lora_layers() or {}
    layers = {f"{attribute}.{name}": tensor for name, tensor in trainable.lora_layers()[attribute].items()}
    getattr(plain, attribute).load_lora_adapter(layers, prefix=attribute)
    pipeline.set_adapters([trainable.name])
    torch.testing.assert_close(output(wrapped(plain)), output(denoiser), rtol=1e-4, atol=1e-5)
    assert trainable.changed_weights() is None


@pytest.mark.parametrize("method", [*WEIGHT_METHODS, "token"])
@pytest.mark.parametrize("carries", [False, True])
def test_changed_weights_make_the_same_of_a_plain_pipeline(method: str, carries: bool) -> None:
    pipeline, plain = families.build("sd"), families.build("sd")
    denoiser = wrapped(pipeline)
    if carries:
        add_active(pipeline)
    trainable = trained(denoiser, method)
    changed = trainable.changed_weights()
    assert changed and trainable.lora_layers() is None
    known = parts.weights(plain)
    for name, (old, new) in changed.items():
        assert torch.equal(old, known[name]) and old.dtype == new.dtype == known[name].dtype
        known[name].data.copy_(new)
    if carries:
        pipeline.disable_lora()
    assert torch.equal(output(wrapped(plain)), output(denoiser))


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.float32) for family in FAMILIES), ("sd", torch.bfloat16)]
)
def test_the_token_method_changes_only_the_rows_of_the_name(family: str, dtype: torch.dtype) -> None:
    pipeline = families.build(family).to(dtype=dtype)
    denoiser = wrapped(pipeline)
    before = weights(pipeline)
    trainable = attached(denoiser, "token")
    encoders = [name for name in parts.TEXT_ENCODERS if getattr(pipeline, name, None) is not None]
    assert [name.partition(".")[0] for name in trainable.named_parameters()] == encoders
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        other, target = output(denoiser, ANCHOR), output(denoiser)
        for _ in range(3):
            step(denoiser, trainable, weight_decay=0.5)
        assert torch.equal(output(denoiser, ANCHOR), other) and not torch.equal(output(denoiser), target)
    moving = output(denoiser)
    trainable.finish()
    torch.testing.assert_close(output(denoiser), moving, rtol=1e-3, atol=1e-3 if dtype == torch.float32 else 0.1)
    after = parts.weights(pipeline)
    for name, old in before.items():
        new = after[name]
        if name.partition(".")[0] in encoders and name.endswith(
            ("token_embedding.weight", "shared.weight", "embed_tokens.weight")
        ):
            tokenizer = getattr(pipeline, name.partition(".")[0].replace("text_encoder", "tokenizer"))
            (row,) = (old != new).any(1).nonzero().flatten().tolist()
            assert "three" in tokenizer.decode([row])
        else:
            assert torch.equal(old, new)


def test_a_name_of_several_tokens_trains_those_that_are_its_own() -> None:
    pipeline = families.build("flux")
    denoiser = wrapped(pipeline)
    prompts = ["a painting in the style of Van Gogh", "van gogh, a photo"]

    def rows(kept: Sequence[str], *names: str) -> dict[str, list[str]]:
        names = names or ("van gogh",)
        trainable = attached(denoiser, "token", target_names=names, prompts=prompts, kept_prompts=kept)
        trainable.remove()
        tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2)
        return {
            row.name.partition(".")[0]: tokenizer.convert_ids_to_tokens(row.ids.tolist())
            for row, tokenizer in zip(trainable.rows.values(), tokenizers, strict=True)
        }

    both = rows(["a painting"])
    assert sorted(both["text_encoder"]) == ["gogh</w>", "van</w>"]
    assert {"▁van", "▁gogh"} <= set(both["text_encoder_2"])
    assert "<unk>" not in both["text_encoder_2"]
    assert rows(["a van on a photo"])["text_encoder"] == ["gogh</w>"]
    assert sorted(rows([], "gogh", "photo")["text_encoder"]) == ["gogh</w>", "photo</w>"]


def test_what_the_token_method_cannot_isolate_is_refused() -> None:
    pipeline = families.build("sd")
    denoiser = wrapped(pipeline)
    before = trace(pipeline)

    def refused(match: str, **settings: Any) -> None:
        with pytest.raises(ValueError, match=match):
            attached(denoiser, "token", **settings)
        assert trace(pipeline) == before

    refused("none of its prompts contains 'four'.*name the target by a word", target_names=["four"])
    refused("none of its prompts contains 'thre'", target_names=["thre"])
    refused("none of its prompts contains ''", target_names=[""])
    refused("'three' has no token of its own in text_encoder: every one of 'three</w>'", kept_prompts=["three eights"])
    refused("cannot erase.*'a painting'.*no token", prompts=[TARGET, "a painting"])


def test_wrong_methods_are_refused_before_anything_is_done() -> None:
    pipeline = families.build("sd")
    denoiser = wrapped(pipeline)
    before = trace(pipeline)
    with pytest.raises(ValueError, match="train_method.*one.*lora, dora.*got 'unet'"):
        attached(denoiser, "unet")
    pipeline.unet.conv_in.weight = nn.Parameter(torch.zeros(8, 4, 3, 3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"unet\.conv_in\.weight.*stored.*torch\.uint8; load.*pipeline"):
        attached(denoiser, "full")
    with pytest.raises(ValueError, match="rank|`r` should be a positive"):
        attached(denoiser, "lora", rank=0)
    pipeline.unet.conv_in.weight = families.build("sd").unet.conv_in.weight
    after = trace(pipeline)
    assert all(after[key] == value for key, value in before.items() if "conv_in.weight" not in key)
    assert after.keys() == before.keys()
    pipeline.text_encoder = None
    for method in ("text_encoder", "token"):
        with pytest.raises(ValueError, match=f"train_method '{method}'.*StableDiffusionPipeline"):
            attached(denoiser, method)
