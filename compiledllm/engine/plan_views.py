"""Two views of a `Plan`: the facts of `compiledllm info`, and the lines an engine logs at start."""

from __future__ import annotations

from typing import Any

from compiledllm.runner.kv_cache import available_bytes
from compiledllm.runner.plan import Plan
from compiledllm.runner.worker import Worker


def facts(plan: Plan) -> dict[str, Any]:
    """Facts about a model on this machine, found without loading its weights.

    `kv_tokens_that_fit` and `full_contexts_that_fit` ignore the memory that activations need. If
    the model is divided among GPUs, sizes in bytes are those of one GPU.
    """
    spec, platform, layout, whole = plan.spec, plan.platform, plan.kv_layout, plan.spec.whole
    layer, attn, weight_bytes = whole.layers[0], whole.attentions[0], spec.num_bytes(spec.weights)
    in_use = plan.state_bytes + (weight_bytes if platform.is_cuda else 0)
    room, _ = available_bytes(plan.config.requested.cache, platform, in_use)
    context_bytes = plan.blocks_per_context * plan.block_bytes
    return {
        "model": str(plan.checkpoint),
        "architecture": spec.architecture,
        "run_by": spec.implementation,
        "layers": len(spec.layers),
        "distinct_layers": len(spec.distinct_layers),
        "hidden_size": spec.hidden_size,
        "attention_heads": attn.num_heads,
        "kv_heads": attn.num_kv_heads,
        "head_dim": attn.head_dim,
        "intermediate_size": layer.mlp.intermediate_size,
        "vocab_size": spec.vocab_size,
        "tied_embeddings": spec.tie_word_embeddings,
        "context": spec.max_position,
        "parameters": whole.num_parameters,
        **(_facts_of_ranks(plan) if plan.ranks.are_many else {}),
        "checkpoint_dtype": plan.stored_dtype,
        "dtype": str(plan.report["dtype"]),
        "attention_backend": str(plan.report["attention_backend"]),
        "quantization": spec.quantization or "none",
        "weight_bytes": weight_bytes,
        "kv_cache_dtype": str(plan.report["kv_cache_dtype"]),
        "kv_groups": str(layout),
        "kv_bytes_per_token": layout.bytes_in_windows,
        "kv_bytes_per_token_past_windows": layout.bytes_past_windows,
        "kv_bytes_of_a_full_context": context_bytes,
        "state_bytes_per_request": spec.bytes_per_request,
        "max_num_seqs": plan.config.limits.max_num_seqs,
        "device": f"{platform.device} ({platform.name})",
        "memory_bytes": platform.memory_bytes,
        "kv_tokens_that_fit": max(room, 0) // layout.bytes_in_windows,
        "full_contexts_that_fit": max(room, 0) // context_bytes,
    }


def _facts_of_ranks(plan: Plan) -> dict[str, Any]:
    """What each of several GPUs holds."""
    attn, mlp = plan.spec.attentions[0], plan.spec.layers[-1].mlp
    shared = f", each by {attn.kv_replicas} GPUs" if attn.kv_replicas > 1 else ""
    return {
        "tensor_parallel_size": plan.ranks.count,
        "attention_heads_of_a_gpu": attn.num_heads,
        "kv_heads_of_a_gpu": f"{attn.num_kv_heads}{shared}",
        "intermediate_size_of_a_gpu": mlp.intermediate_size,
        "parameters_of_a_gpu": plan.spec.num_parameters,
    }


def readable(found: dict[str, Any]) -> dict[str, str]:
    """The same facts with sizes in units that people read, under names in words."""
    return {_in_words(name): _shown(name, value) for name, value in found.items()}


def _in_words(name: str) -> str:
    words = name.removesuffix("_bytes").replace("_bytes", "").split("_")
    shown = " ".join("KV" if word == "kv" else word for word in words)
    return {"weight": "weights"}.get(shown, shown)


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if "bytes" in name:
        return size(value)
    if name.startswith("parameters"):
        return f"{value / 1e9:.2f} B" if value >= 1e9 else f"{value / 1e6:.1f} M"
    return f"{value:,}" if isinstance(value, int) else str(value)


def size(num_bytes: int) -> str:
    """A number of bytes in the largest binary unit of which there is at least one."""
    for unit, bits in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if num_bytes >= 2**bits:
            return f"{num_bytes / 2**bits:.4g} {unit}"
    return f"{num_bytes} bytes"


def start_lines(plan: Plan, worker: Worker) -> dict[str, str]:
    """The lines that an engine logs at start, by topic: what was chosen, and why."""
    spec, limits, report = worker.spec, plan.config.limits, plan.report | worker.report
    num_layers, distinct = len(spec.layers), len(spec.distinct_layers)
    has_windows = any(attn.sliding_window for attn in spec.attentions)
    lines: dict[str, Any] = {
        "model": f"{plan.checkpoint} ({spec.architecture}, {num_layers} layers, "
        f"{spec.whole.num_parameters / 1e6:.1f} M parameters)",
        "divided": report.get("all_reduce"),
        "run by": report.get("model_impl"),
        "tied head": report.get("tie_word_embeddings"),
        "device": f"{plan.platform.device} ({plan.platform.name}; {plan.platform.versions()})",
        "dtype": report["dtype"],
        "weights": spec.quantization or None,
        "products": report["products"].value if report.get("products") else None,
        "attention": report["attention_backend"],
        "decode": report.get("decode_step"),
        "memory": report.get("memory"),
        "states": report.get("states"),
        "prefixes": report.get("enable_prefix_caching"),
        "KV cache": _cache_line(plan, worker),
        "KV dtype": report["kv_cache_dtype"],
        "KV scales": report.get("kv_scales"),
        "KV groups": report["kv_groups"] if has_windows else None,
        "context": report["max_model_len"],
        "batch": f"at most {limits.max_num_seqs} requests, "
        f"{report['max_num_batched_tokens']} tokens a step",
        "compile": f"{report['compile']}, {distinct} distinct of {num_layers}",
        "capture": report["capture"],
        "ready in": worker.ledger.line(),
    }
    return {topic: str(line) for topic, line in lines.items() if line is not None}


def _cache_line(plan: Plan, worker: Worker) -> str:
    size, blocks = plan.config.limits.block_size, worker.num_kv_blocks
    room = f"= {blocks * size} tokens"
    if plan.kv_layout.windows != (0,):
        max_len, needed = plan.config.limits.max_model_len, plan.blocks_per_context
        room = f"of a group of layers; {max_len} tokens of a request take {needed}"
    mib = blocks * plan.block_bytes / 2**20
    reason = worker.report["num_kv_blocks"].reason
    return f"{blocks} blocks of {size} tokens {room}, {mib:.0f} MiB ({reason})"
