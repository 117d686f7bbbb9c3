"""Which architectures can be trained on packed sequences: tiny random models of each, on a CPU, in a minute.

  python tests/studies/architectures.py

packed, padded: the largest difference between log-probabilities of two sequences, laid end to end or in padded rows,
and those of each alone. `train` makes the same test with the real model, and uses padded rows if packing leaks."""
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402

SMALL = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, max_position_embeddings=512, pad_token_id=0)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
MODELS = {
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {}, "qwen3_moe": EXPERTS, "smollm3": {}, "olmo2": {}, "olmo3": {},
    "phi3": {}, "gemma2": {}, "gemma3_text": {}, "granite": {},
    "qwen3_next": {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32}, "qwen3_5_text": LINEAR,
    "falcon_h1": dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16),
    "granitemoehybrid": dict(mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16, num_local_experts=0,
                             shared_intermediate_size=64, layer_types=["mamba", "attention"] * 2),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2),
}
FIRST = [([], list(range(5, 37)))]
SECOND = [([], list(range(99, 67, -1)))]


@torch.no_grad()
def differences(name, options):
    """Return how far log-probabilities of packed and of padded sequences are from those of each alone."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SMALL | options)
    if any(getattr(config, name, None) for name in common.SCALED):
        sys.exit()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="packed")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(3)  # so that the layers matter
    policy = common.Policy(model)
    alone = torch.cat([policy(common.pack([FIRST])), policy(common.pack([SECOND]))])
    found = []
    for policy.packs in (True, False):
        found.append(float((policy(common.pack([FIRST, SECOND])) - alone).abs().max()))
    return found


if __name__ == "__main__":
    common.setup()
    common.AttentionInterface.register("packed", common.packed_attention)
    print("| architecture | packed | padded | trained |\n|---|---|---|---|")
    for name, options in MODELS.items():
        try:
            packed, padded = differences(name, options)
        except SystemExit:  # printed on standard error
            print(f"| {name} | - | - | refused |")
            continue
        print(f"| {name} | {packed:.1g} | {padded:.1g} | {'packed' if packed < 0.001 else 'in padded rows'} |")
