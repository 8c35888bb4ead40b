"""The ``megatron`` mappings as config values: overrides, dumps, and what a resumed run says about a change."""

from __future__ import annotations

from pathlib import Path

from megatron_dypo.config.reading.load import changed_lines, dump_config, load_config, override_lines

TEXT = """
model: {hf_path: m, megatron: {attention_backend: flash, offload_modules: [core_attn], moe_router_dtype: null}}
parallel: {megatron: {bucket_size: 1000}}
data: {prompts: [p]}
"""


def test_overrides_set_single_fields_and_a_dump_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(TEXT)
    config = load_config(path, ["optimizer.megatron.exp_avg_dtype=bfloat16", "model.megatron.attention_backend=fused"])
    assert config.optimizer.megatron == {"exp_avg_dtype": "bfloat16"}
    assert config.model.megatron["attention_backend"] == "fused"
    (tmp_path / "b.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "b.yaml") == config


def test_a_resumed_run_names_each_field_that_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(TEXT)
    before = load_config(path)
    after = load_config(
        path, ["parallel.megatron={}", "model.megatron.attention_backend=fused", "optimizer.megatron.a=1"]
    )
    assert changed_lines(dump_config(before), dump_config(after)) == [
        "model.megatron.attention_backend: 'flash' → 'fused'",
        "parallel.megatron.bucket_size: 1000 → absent",
        "optimizer.megatron.a: absent → 1",
    ]
    assert load_config(path, override_lines(before, after)) == after
