"""A Llama-shaped Hugging Face checkpoint as an f16 GGUF file, for llama.cpp's programs.

    python3 scripts/peers/to_gguf.py CHECKPOINT OUT.gguf [VOCABULARY.gguf]

The vocabulary is that of another GGUF file with as many tokens; without it the file has none. Peers and nibble then compute with the same weights. Reads safetensors by hand (no torch), one tensor at a time.
"""

import json
import struct
import sys
from pathlib import Path

import gguf
import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors(folder: Path):
    """Name, floats of every tensor of every shard."""
    for shard in sorted(folder.glob("*.safetensors")):
        with shard.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                file.seek(8 + length + start)
                data = file.read(end - start)
                if entry["dtype"] == "BF16":
                    values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
                else:
                    values = np.frombuffer(data, {"F32": np.float32, "F16": np.float16}[entry["dtype"]])
                yield name, values.astype(np.float32).reshape(entry["shape"])


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.weight"
    return f"{NAMES[stem]}.weight"


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in the order that llama.cpp's rotation wants: pairs side by side instead of halves."""
    rows = values.shape[0] // heads
    return values.reshape(heads, 2, rows // 2, -1).swapaxes(1, 2).reshape(values.shape)


def lend_vocabulary(path: str, writer: gguf.GGUFWriter):
    for name, field in gguf.GGUFReader(path).fields.items():
        if name.startswith("tokenizer."):
            kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), kind, inner)


def main():
    folder, out = Path(sys.argv[1]), sys.argv[2]
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(out, "llama", use_temp_file=True)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if len(sys.argv) > 3:
        lend_vocabulary(sys.argv[3], writer)
    else:
        writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, values in tensors(folder):
        if "q_proj" in name:
            values = interleave(values, heads)
        if "k_proj" in name:
            values = interleave(values, kv_heads)
        writer.add_tensor(gguf_name(name), values if values.ndim == 1 else values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
