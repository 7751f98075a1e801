"""Stable Diffusion 3 and 3.5: a transformer that attends jointly to image and text (MMDiT)."""

from __future__ import annotations

from diffusers import DiffusionPipeline, SD3Transformer2DModel
from torch import Tensor

from fdu.models.denoiser import Conditioning
from fdu.models.grids import FlowDenoiser
from fdu.models.kohya_names import IMAGE_QKV, TEXT_QKV, KohyaNames, transformer_layers

BLOCK = {
    IMAGE_QKV: "x_block_attn_qkv",
    ("attn2.to_q", "attn2.to_k", "attn2.to_v"): "x_block_attn2_qkv",
    TEXT_QKV: "context_block_attn_qkv",
    ("attn.to_out.0",): "x_block_attn_proj",
    ("attn2.to_out.0",): "x_block_attn2_proj",
    ("attn.to_add_out",): "context_block_attn_proj",
    ("ff.net.0.proj",): "x_block_mlp_fc1",
    ("ff.net.2",): "x_block_mlp_fc2",
    ("ff_context.net.0.proj",): "context_block_mlp_fc1",
    ("ff_context.net.2",): "context_block_mlp_fc2",
    ("norm1.linear",): "x_block_adaLN_modulation_1",
    ("norm1_context.linear",): "context_block_adaLN_modulation_1",
}
OTHERS = {
    "context_embedder": "context_embedder",
    "pos_embed.proj": "x_embedder_proj",
    "proj_out": "final_layer_linear",
    "norm_out.linear": "final_layer_adaLN_modulation_1",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder_mlp_0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder_mlp_2",
    "time_text_embed.text_embedder.linear_1": "y_embedder_mlp_0",
    "time_text_embed.text_embedder.linear_2": "y_embedder_mlp_2",
}
KOHYA = KohyaNames(
    transformer_layers({"joint_blocks": ("transformer_blocks", BLOCK)}, OTHERS),
    version=lambda pipeline: "sd3",
    network="networks.lora_sd3",
)


class SD3Denoiser(FlowDenoiser):
    """An SD3Transformer2DModel with two CLIP text encoders and, as in the pipeline, with or without T5."""

    family = "Stable Diffusion 3 (an SD3Transformer2DModel)"
    module_class = SD3Transformer2DModel
    parts = ("scheduler", "vae", "tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    # The text's own keys and values: what attn2.to_k and to_v are to a UNet. ESD trains them, EraseAnything the keys.
    context_projections = ("attn.add_k_proj", "attn.add_v_proj")
    attention_projections = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    )
    kohya = KOHYA

    def __init__(self, pipeline: DiffusionPipeline, resolution: int | None = None) -> None:
        super().__init__(pipeline, resolution)
        largest = self.config.pos_embed_max_size * self.size_unit
        if max(self.height, self.width) > largest:
            raise ValueError(f"resolution must be at most {largest} pixels for this model, got {resolution}")

    @classmethod
    def check(cls, pipeline: DiffusionPipeline) -> None:
        super().check(pipeline)
        if pipeline.text_encoder_3 is not None and pipeline.tokenizer_3 is None:
            raise ValueError("pipeline has a text_encoder_3 but no tokenizer_3; load it with both or with neither")

    @property
    def size_unit(self) -> int:
        return super().size_unit * self.config.patch_size

    def encode_batch(self, prompts: list[str]) -> Conditioning:
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=self.device, do_classifier_free_guidance=False
        )
        return Conditioning({"embeddings": embeddings, "pooled": pooled})

    def predict(self, noisy: Tensor, indices: Tensor, conditioning: Conditioning) -> Tensor:
        return self.module(
            noisy,
            conditioning.tensors["embeddings"],
            conditioning.tensors["pooled"],
            self.timesteps(indices),
        ).sample
