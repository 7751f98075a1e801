"""Tiny pipelines with random weights, one of each family, built from configs, and what a training could do to them;
and a CLIP model to judge images.

``build(name)`` gives the same weights on every call. Images are 16 pixels wide (Sana's and Wan's 32,
Lumina's 64), latents 8x8.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    GlmConfig,
    GlmModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from fdu.models import parts
from fdu.models.denoiser import Denoiser
from fdu.models.families import denoiser_of
from fdu.subjects.from_scratch import END, START, learn_tokenizer

CORPUS = ["a photo of the digit three", "a photo of the digit eight", "a painting in the style of van gogh"]
CLIP_WIDTH, T5_WIDTH = 16, 32
SAMPLE_SIZE = 8
RESOLUTION = {"sana": 32, "lumina2": 64, "wan": 32}
"""Pixels of a square image, where they are not 16. FLUX and Chroma have no size of their own: give it with
every call."""
FRAMES = {"wan": 5}
"""Frames of the videos of the tests."""


def build(name: str, **settings: Any) -> DiffusionPipeline:
    """The tiny pipeline of a family in FAMILY_NAMES, in float32 on the CPU; ``settings`` of the family's function."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = BUILDERS[name](**settings)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # as from_pretrained leaves it
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def denoiser(name: str, pipeline: DiffusionPipeline | None = None, **settings: Any) -> Denoiser:
    """The denoiser of a tiny pipeline, by default a new one, for images and videos of the tests' size."""
    return denoiser_of(pipeline or build(name, **settings), resolution(name), FRAMES.get(name))


def needed(name: str) -> dict[str, Any]:
    """The settings that every training of the tiny pipeline needs."""
    sampling = {"timestep_sampling": "inference"} if name == "flux" else {}
    return {"resolution": resolution(name), "num_frames": FRAMES.get(name), **sampling}


def resolution(name: str) -> int:
    """The pixels of a square image that suit the tiny pipeline."""
    return RESOLUTION.get(name, 16)


def sd(prediction_type: str = "epsilon", zero_terminal_snr: bool = False) -> StableDiffusionPipeline:
    """Stable Diffusion 1.x, or 2.x with "v_prediction"."""
    scheduler = DDIMScheduler(
        **BETAS,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal_snr,
    )
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(),
        unet=UNet2DConditionModel(**UNET, cross_attention_dim=CLIP_WIDTH),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(second_width: int = CLIP_WIDTH) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL: two text encoders, a pooled embedding and six time ids."""
    time_ids = 6 * 8
    unet = UNet2DConditionModel(
        **UNET,
        cross_attention_dim=CLIP_WIDTH + second_width,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=time_ids + second_width,
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder(force_upcast=True),
        text_encoder=CLIPTextModel(clip_config()),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(second_width)),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )


def sd3() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3: two CLIP text encoders and a T5, which may be left out when loading."""
    transformer = SD3Transformer2DModel(
        sample_size=SAMPLE_SIZE,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(**FLOW_VAE),
        text_encoder=CLIPTextModelWithProjection(clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
    )


def flux(guidance_embeds: bool = False) -> FluxPipeline:
    """FLUX.1: schnell, or with ``guidance_embeds`` dev, whose schedule shifts with the resolution."""
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    shift = 3.0 if guidance_embeds else 1.0
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=guidance_embeds),
        vae=autoencoder(**FLOW_VAE),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )


def pixart(sample_size: int = SAMPLE_SIZE) -> PixArtAlphaPipeline:
    """PixArt-alpha with learned variance; with ``sample_size`` 128 it also reads resolution and aspect ratio."""
    transformer = PixArtTransformer2DModel(
        sample_size=sample_size,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        cross_attention_dim=24,
        caption_channels=T5_WIDTH,
        in_channels=4,
        out_channels=8,
    )
    return PixArtAlphaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=autoencoder(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )


def sana() -> SanaPipeline:
    """Sana: linear attention, a Gemma text encoder and a deep compression autoencoder."""
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=SAMPLE_SIZE,
    )
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    tokenizer = gemma_tokenizer(tuple(instruction))
    text_encoder = Gemma2Model(
        Gemma2Config(**{**decoder_settings(tokenizer), "num_hidden_layers": 1, "initializer_range": 0.02})
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.41407,
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
    )


def auraflow() -> AuraFlowPipeline:
    """AuraFlow: a block of two streams, one of a single stream, and a UMT5."""
    transformer = AuraFlowTransformer2DModel(
        sample_size=SAMPLE_SIZE,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=256,
    )
    louder(transformer, "time_step_proj.linear_2", 16)
    return AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5_encoder(),
        vae=autoencoder(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def chroma() -> ChromaPipeline:
    """Chroma: FLUX.1 without CLIP; one small network makes the modulations of all blocks."""
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    louder(transformer, "distilled_guidance_layer.out_proj", 4)
    return ChromaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(**FLOW_VAE),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
    )


def cogview4() -> CogView4Pipeline:
    """CogView 4: one stream, and a GLM of two layers."""
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=8,
        sample_size=SAMPLE_SIZE,
        rope_axes_dim=(8, 8),
    )
    tokenizer = word_tokenizer(("[gMASK]", "<sop>"), padding_side="left")
    text_encoder = GlmModel(
        GlmConfig(
            **decoder_settings(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
        )
    )
    shift = {"base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear", "use_dynamic_shifting": True}
    return CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=autoencoder(**{**FLOW_VAE, "shift_factor": None}),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
    )


def lumina2() -> Lumina2Pipeline:
    """Lumina Image 2: two refiners of the text and two of the image, one joint block, and a Gemma of two layers."""
    transformer = Lumina2Transformer2DModel(
        sample_size=SAMPLE_SIZE,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 16, 16),
        cap_feat_dim=64,
    )
    louder(transformer, "norm1.linear", 4)
    none = dict.fromkeys(("transformer", "scheduler", "vae", "text_encoder", "tokenizer"))
    tokenizer = gemma_tokenizer((Lumina2Pipeline(**none).system_prompt,))
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder(blocks=4, **FLOW_VAE),
        text_encoder=Gemma2Model(Gemma2Config(**decoder_settings(tokenizer, width=64))),
        tokenizer=tokenizer,
    )


def qwenimage() -> QwenImagePipeline:
    """Qwen-Image: two streams, a Qwen2.5-VL behind a template, and an autoencoder of videos."""
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    none = dict.fromkeys(("transformer", "scheduler", "vae", "text_encoder", "tokenizer"))
    tokenizer = word_tokenizer(
        special=("<|im_start|>", "<|im_end|>"), also=(QwenImagePipeline(**none).prompt_template_encode,)
    )
    settings = {**decoder_settings(tokenizer, width=32), "head_dim": None}
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    vae = AutoencoderKLQwenImage(**VIDEO_VAE, dim_mult=[1, 1], temperal_downsample=[False])
    shift = {"use_dynamic_shifting": True, "shift_terminal": 0.02, "max_shift": 0.9}
    return QwenImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**shift),
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=settings, vision_config=vision)),
        tokenizer=tokenizer,
    )


def zimage() -> ZImagePipeline:
    """Z-Image: two refiners of the text and two of the image, one joint block, and a Qwen3 behind a template."""
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    tokenizer = chat_tokenizer()
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder(**FLOW_VAE),
        text_encoder=Qwen3Model(Qwen3Config(**decoder_settings(tokenizer, width=32))),
        tokenizer=tokenizer,
    )


def flux2() -> Flux2Pipeline:
    """FLUX.2 dev: guidance is an input; a Mistral of so many layers that the pipeline finds those it takes."""
    tokenizer = word_tokenizer(padding_side="left", also=(SYSTEM_MESSAGE,))
    tokenizer.chat_template = "{% for message in messages %}{{ message.content[0].text }}\n{% endfor %}"
    settings = {**decoder_settings(tokenizer, FLUX2_WIDTH), "num_hidden_layers": 30, "initializer_range": 0.2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Mistral3Config(
        text_config={"model_type": "mistral", **settings},
        vision_config={"model_type": "pixtral", **vision},
        tie_word_embeddings=False,
    )
    return Flux2Pipeline(
        transformer=flux2_transformer(guidance_embeds=True),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flux2_autoencoder(),
        text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=tokenizer,
    )


def flux2_klein() -> Flux2KleinPipeline:
    """FLUX.2 klein base: guided by two predictions, with a Qwen3."""
    tokenizer = chat_tokenizer()
    settings = {**decoder_settings(tokenizer, FLUX2_WIDTH), "num_hidden_layers": 28, "initializer_range": 0.2}
    return Flux2KleinPipeline(
        transformer=flux2_transformer(guidance_embeds=False),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flux2_autoencoder(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**settings)),
        tokenizer=tokenizer,
    )


def wan(expand_timesteps: bool = False) -> WanPipeline:
    """Wan 2.1, or with ``expand_timesteps`` 2.2 5B: videos, two blocks, and a UMT5."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=T5_WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=64,
    )
    louder(transformer, "condition_embedder.text_embedder.linear_2", 16)
    settings = {"dim_mult": [1, 1, 1], "temperal_downsample": [True, True]}
    vae = AutoencoderKLWan(**VIDEO_VAE, **settings, scale_factor_temporal=4, scale_factor_spatial=4)
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5_encoder(),
        vae=vae,
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        expand_timesteps=expand_timesteps,
    )


FLUX2_WIDTH = 176
"""Three layers of a text encoder as wide as this are wider than the pipeline's prompts are long."""


def flux2_transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    """One block of two streams and one of a single stream."""
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * FLUX2_WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    louder(transformer, "timestep_embedder.linear_2", 16)
    louder(transformer, "add_v_proj", 4)
    return transformer


def flux2_autoencoder() -> AutoencoderKLFlux2:
    """A 16x16x3 to 8x8x4 autoencoder that knows the mean and variance of its latents' patches."""
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
        sample_size=16,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


@torch.no_grad()
def louder(module: nn.Module, ending: str, factor: float) -> None:
    """Multiply the weights of layers: the blocks of some random models are shut, and their images ignore the prompt."""
    for name, layer in module.named_modules():
        if name.endswith(ending):
            layer.weight.mul_(factor)


def autoencoder(blocks: int = 2, **settings: Any) -> AutoencoderKL:
    """A 16x16x3 to 8x8x4 autoencoder; each further block halves the latent."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
        sample_size=16,
        **settings,
    )


def clip_config(width: int = CLIP_WIDTH) -> CLIPTextConfig:
    """A two-layer CLIP text encoder."""
    tokenizer = clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=tokenizer.convert_tokens_to_ids(START),
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END),
    )


def t5_encoder() -> T5EncoderModel:
    """A one-layer T5 text encoder."""
    return T5EncoderModel(T5Config(**t5_settings()))


def umt5_encoder() -> UMT5EncoderModel:
    """A one-layer UMT5 text encoder."""
    return UMT5EncoderModel(UMT5Config(**t5_settings()))


def t5_settings() -> dict[str, Any]:
    """The settings of a one-layer T5."""
    return {
        "vocab_size": len(t5_tokenizer()),
        "d_model": T5_WIDTH,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }


@functools.cache
def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE with CLIP's conventions, 16 tokens a prompt."""
    return learn_tokenizer(CORPUS, max_length=16)


@functools.cache
def t5_tokenizer() -> T5Tokenizer:
    """Unigrams: the words of the corpus, and letters for all others."""
    words = sorted({word for prompt in CORPUS for word in prompt.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in words]
    pieces += [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


@functools.cache
def gemma_tokenizer(instruction: tuple[str, ...]) -> GemmaTokenizer:
    """BPE over the corpus and over the instruction that a pipeline puts before every prompt."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=special, show_progress=False)
    learner.train_from_iterator([*CORPUS, *instruction], trainer)
    model = json.loads(learner.to_str())["model"]
    return GemmaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


@functools.cache
def word_tokenizer(
    prefix: tuple[str, ...] = (),
    padding_side: str = "right",
    special: tuple[str, ...] = (),
    also: tuple[str, ...] = (),
) -> PreTrainedTokenizerFast:
    """Byte-level BPE: the words of the corpus and of ``also``, and letters for all others; with tokens before every
    prompt, and special ones."""
    end = "<|endoftext|>"
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[end, *prefix, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [re.sub("|".join(map(re.escape, special)) or "$^", "", one) for one in also]
    learner.train_from_iterator([*CORPUS, *text], trainer)
    if prefix:
        tokens = [(token, learner.token_to_id(token)) for token in prefix]
        learner.post_processor = processors.TemplateProcessing(single=[*prefix, "$A"], special_tokens=tokens)
    return PreTrainedTokenizerFast(tokenizer_object=learner, pad_token=end, eos_token=end, padding_side=padding_side)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The words of the corpus in the form of a chat."""
    tokenizer = word_tokenizer(special=("<|im_start|>", "<|im_end|>"), also=("user\nassistant\n",))
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def decoder_settings(tokenizer: Any, width: int = 16) -> dict[str, Any]:
    """The settings of a language model of two layers."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "initializer_range": 0.5,
    }


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VIDEO_VAE: dict[str, Any] = {
    **{"base_dim": 8, "z_dim": 4, "num_res_blocks": 1},
    **{"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 2.0, 0.5, 1.0]},
}
FLOW_VAE = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0609, "scaling_factor": 1.5305}
UNET = {
    "sample_size": SAMPLE_SIZE,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
    "norm_num_groups": 4,
}
BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd": sd,
    "sd_v": functools.partial(sd, "v_prediction", zero_terminal_snr=True),
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "flux_guidance": functools.partial(flux, guidance_embeds=True),
    "pixart": pixart,
    "sana": sana,
    "auraflow": auraflow,
    "chroma": chroma,
    "cogview4": cogview4,
    "lumina2": lumina2,
    "qwenimage": qwenimage,
    "zimage": zimage,
    "flux2": flux2,
    "flux2_klein": flux2_klein,
    "wan": wan,
}
FAMILY_NAMES = tuple(BUILDERS)


CLIP_SIZE = 32
"""Height and width of the images that its image encoder takes."""
CLIP_LAYERS = 6
WORDS = "a photo of three eight two zero ink"
CONCEPTS = """[target] three
a photo of {}
[unseen]
a scan of {}
[anchor] eight
a photo of eight
[near] two
[generic] zero
a picture of {}
[unrelated] ink
in black ink
"""
"""A concept set, and some of its words, for the digits pipeline taken for a pipeline like any other."""


def save_clip(folder: Path, words: str) -> Path:
    """Write a CLIP model of random weights, its tokenizer (of ``words``) and its image processor into ``folder``."""
    tokenizer = learn_tokenizer(words.split(), 16)
    width = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    tokens = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config={**width, "num_hidden_layers": 2, **tokens},
        vision_config={**width, "num_hidden_layers": CLIP_LAYERS, "image_size": CLIP_SIZE, "patch_size": 8},
        projection_dim=16,
        # Random weights of the usual size would map all images to nearly one place.
        initializer_factor=20.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": CLIP_SIZE, "width": CLIP_SIZE}
    CLIPImageProcessor(size={"shortest_edge": CLIP_SIZE}, crop_size=size).save_pretrained(folder)
    return folder


Layers = dict[str, dict[str, Tensor]]
Changes = dict[str, tuple[Tensor, Tensor]]
CONTEXT = {
    "sd": ("attn2.to_k", "attn2.to_v"),
    "sdxl": ("attn2.to_k", "attn2.to_v", "add_embedding.linear_1"),
    "sd3": ("attn.add_k_proj", "attn.add_v_proj", "context_embedder", "text_embedder.linear_1"),
    "flux": ("attn.add_k_proj", "attn.add_v_proj", "context_embedder", "text_embedder.linear_1"),
    "sana": ("attn2.to_k", "attn2.to_v"),
}
"""The layers of each family that read the prompt."""
RANK, ALPHA = 3, 6.0


@torch.no_grad()
def output(pipeline: DiffusionPipeline, name: str) -> Tensor:
    """What the denoiser predicts for a fixed input and prompt."""
    model = denoiser(name, pipeline)
    noisy = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    return model.predict(noisy, torch.tensor([400]), model.encode(["a photo of the digit three"]))


def add_adapter(
    pipeline: DiffusionPipeline, attribute: str, endings: Sequence[str], dora: bool = False, adapter_name: str = "fdu"
) -> dict[str, Tensor]:
    """A random adapter on the layers with these endings; returns its tensors in peft's names."""
    model = getattr(pipeline, attribute)
    names = [
        name
        for name, layer in parts.layers(model).items()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and f".{name}".endswith(tuple(f".{ending}" for ending in endings))
    ]
    assert names
    model.requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, use_dora=dora)
    model.add_adapter(config, adapter_name=adapter_name)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if f".{adapter_name}." in name:
            parameter.requires_grad_(False)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter * (1 + 0.3 * noise) if "magnitude" in name else 0.3 * noise)
    model.eval()
    return get_peft_model_state_dict(model, adapter_name=adapter_name)


def change_weights(pipeline: DiffusionPipeline, attribute: str, endings: Sequence[str]) -> Changes:
    """New weights of the layers with these endings; returns those before and after."""
    generator = torch.Generator().manual_seed(3)
    changes = {}
    for name, parameter in getattr(pipeline, attribute).named_parameters():
        if name.removesuffix(".weight").endswith(tuple(endings)):
            before = parameter.detach().clone()
            parameter.data = before + 0.3 * torch.randn(before.shape, generator=generator).to(before)
            changes[f"{attribute}.{name}"] = (before, parameter.detach().clone())
    assert changes
    return changes


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
