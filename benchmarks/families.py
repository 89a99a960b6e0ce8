"""Every causal-LM family of the installed Transformers: right, refused, or silently wrong.

    OMP_NUM_THREADS=1 python benchmarks/families.py
    OMP_NUM_THREADS=1 python benchmarks/families.py cohere granitemoe

Each family is built at a tiny size with random weights, saved as a checkpoint, and loaded like any
target. Every scale in its config that is 1 is set to another value and every weight is disturbed,
so that a scale or a weight which DeepSpec leaves out shows. Right: the loaded target gives the
logits that Transformers gives, its embedding is what enters the first layer, embedding and LM head
read alone are the same, and decoding gives the tokens of Transformers' `generate`, also where
drafts are taken back. Refused: a TargetError said why not. Each family runs in a process of its
own; the script exits with 1 when one is silently wrong or ends in another error than a TargetError.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deepspec.checks.decoding import DecodingCheck
from deepspec.checks.finding import Finding, tried
from deepspec.config.schema import TargetConfig
from deepspec.errors import DeepSpecError, TargetError, first_line
from deepspec.records import Sample
from deepspec.targets import Target, load_ends, load_target
from deepspec.targets.agreement import both_embeddings, gap, variation

TINY = Path(__file__).resolve().parents[1] / "data/tiny_target"
SECONDS, LAYERS, NEW_TOKENS = 180, 4, 6
EXACT = 1e-4  # relative root mean square in fp32
RIGHT, REFUSED, WRONG, CRASHED, UNBUILT = (
    "right",
    "refused",
    "silently wrong",
    "crashed",
    "not built",
)

# config keys and their value at tiny size
SIZES = {
    r"\w*vocab_size\w*": 4352,  # more than the tokenizer's entries
    r"index_n_heads": 32,  # with few, all scores of an entry may be 0, and ties go either way
    r"(num_hidden_layers|num_layers|n_layers?|num_blocks|(num_)?(en|de)coder_layers)": LAYERS,
    r"(hidden_size|d_model|n_embd|dim|embedding_size|embedding_dim|word_embed_proj_dim)": 64,
    r"\w*(intermediate|ffn|inner)\w*_(size|dim)|n_inner|d_ff": 96,
    r"\w*(num_attention_heads|n_heads?|num_heads|attention_heads)": 4,
    r"\w*(num_key_value_heads|num_kv_heads|kv_heads)": 2,
    r"(v_|qk_nope_|global_|swa_|attention_|linear_\w*_)?head_dim|kv_channels": 16,
    r"qk_rope_head_dim|rotary_dim": 8,
    r"\w*lora_rank": 32,
    r"num_experts|num_local_experts|n_routed_experts|moe_num_experts": 4,
    r"n_group|num_expert_group|topk_group|num_group": 1,
    r"\w*(per_tok|top_k|topk)": 2,
    r"sliding_window|attention_window_size|attention_chunk_size": 16,
    r"max_position_embeddings|n_positions|max_seq(uence)?_len(gth)?": 512,
    r"mamba_n_heads|linear_num_\w*heads|mamba_num_heads": 4,
    r"\w+_layer_period": 2,
    r"\w+_layer_offset": 1,
    r"pad_token_id": 0,
    r"bos_token_id": 1,
    r"eos_token_id": 2,
    r"initializer_range|init_std": 0.2,
    r"\w*dropout\w*|\w*pdrop": 0.0,
}
SCALE, SCALED, CAP = re.compile(r"scal|mult|mup"), 1.7, 5.0
# tried in turn where a family does not run with the above
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 4, "head_dim": 8},
    {"num_key_value_heads": 2, "head_dim": 16},
    {"layer_types": None},
)
HYBRID = ["mamba", "attention"] * (LAYERS // 2)
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": HYBRID},
    "mamba2": {"num_heads": 8, "head_dim": 16},
}


def main() -> None:
    """Judge all families, or those of the command line, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="*", help="model types; none takes all")
    names = parser.parse_args().families or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    judge("llama")  # loads the libraries once, before processes are forked
    table, counts = Table("family", "", "why", box=None), Counter[str]()
    for index, name in enumerate(names):
        verdict, why = alone(name)
        counts[verdict] += 1
        table.add_row(name, verdict, escape(why))
        print(f"{index + 1}/{len(names)} {name}: {verdict} {why}", file=sys.stderr, flush=True)
    console = Console(width=160)
    console.print(table)
    console.print(f"Transformers {transformers.__version__}, {len(names)} families: {dict(counts)}")
    sys.exit(1 if counts[WRONG] or counts[CRASHED] else 0)


def alone(name: str) -> tuple[str, str]:
    """`judge` in a process of its own, whose memory is freed and whose end is not ours."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_send, args=(name, there))
    process.start()
    there.close()
    try:
        found = here.recv() if here.poll(SECONDS) else (UNBUILT, f"longer than {SECONDS} s")
    except EOFError:
        found = (CRASHED, "the process died")
    process.kill()
    process.join()
    return found


def _send(name: str, there: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    there.send(judge(name))


def judge(name: str) -> tuple[str, str]:
    """The verdict on the family `name`, and why."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = build(name)
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
            reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        except Exception as error:
            return UNBUILT, _line(error)
        config = TargetConfig(path=folder, dtype="float32", layer_ids=[0])
        said = io.StringIO()
        try:
            with redirect_stderr(said):
                target = load_target(config, "cpu")
                faults, notes = compare(target, reference, config)
        except TargetError as error:
            return REFUSED, _line(error).replace(folder, "PATH")
        except Exception as error:
            return CRASHED, _line(error)
    notes += [line for line in said.getvalue().splitlines() if line.startswith("target family")]
    return (WRONG, "; ".join(faults)) if faults else (RIGHT, "; ".join(notes))


def build(name: str) -> Any:
    """A tiny random model of the family. Raises the error of the first variant if none runs."""
    errors: list[Exception] = []
    for variant in VARIANTS:
        try:
            kind = CONFIG_MAPPING[name]
            values = tiny(kind().to_dict(), {**variant, **OWN.get(name, {})})
            torch.manual_seed(0)
            made = AutoModelForCausalLM.from_config(kind(**values), dtype=torch.float32).eval()
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
                made(input_ids=torch.arange(5, 29)[None])
            return made
        except Exception as error:
            errors.append(error)
    raise errors[0]


def tiny(values: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config's `values` is another at tiny size; `fixed`: keys of which that is known."""
    counts = ("num_hidden_layers", "num_layers", "n_layer", "decoder_layers")
    layers = next((values[key] for key in counts if isinstance(values.get(key), int)), None)
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in fixed:
            found[key] = fixed[key]
        elif isinstance(value, dict):
            if key.endswith("_config"):
                found[key] = tiny(value, fixed)
        elif isinstance(value, list) and layers and len(value) == layers:
            found[key] = _few(value)
        elif sizes := [size for pattern, size in SIZES.items() if re.fullmatch(pattern, key)]:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found[key] = type(value)(sizes[0])
        elif key == "final_logit_softcapping":
            found[key] = CAP
        elif SCALE.search(key) and value == 1 and isinstance(value, float):
            found[key] = SCALED
        elif key == "is_decoder" or key == "mup_enabled":
            found[key] = True
    return found


def _few(kinds: Sequence[Any]) -> list[Any]:
    """`LAYERS` entries of a list with one per layer, with every kind among them that fits."""
    different = [kinds[index] for index in range(len(kinds)) if kinds[index] not in kinds[:index]]
    first = list(kinds[:LAYERS])
    missing = [kind for kind in different if kind not in first]
    return first[: LAYERS - len(missing)] + missing[:LAYERS]


def compare(target: Target, reference: Any, config: TargetConfig) -> tuple[list[str], list[str]]:
    """What is wrong about `target`, and what to note about it."""
    faults, notes = [], []
    texts = [list(range(300, 324)), list(range(700, 711))]  # longer and shorter than the window
    samples = [Sample(torch.tensor(text), torch.ones(len(text)).bool(), "") for text in texts]
    logits = target.head(target.features(samples).final)
    with torch.no_grad():
        expected = [reference(input_ids=sample.input_ids[None]).logits[0] for sample in samples]
    if gap(logits, torch.cat(expected)).relative > EXACT:
        faults.append(f"logits {variation(logits, torch.cat(expected)):.2g} in total variation")
    if gap(*both_embeddings(target, samples[0])).relative > EXACT:
        faults.append("the embedding is not what enters the first layer")
    try:
        ends, final = load_ends(config, "cpu"), torch.ones(target.hidden_size)
        if not torch.equal(ends.embedding, target.embedding):
            faults.append("the embedding read alone is another")
        if not torch.equal(ends.head(final), target.head(final)):
            faults.append("the LM head read alone is another")
    except TargetError as error:
        notes.append(f"ends alone are refused ({_line(error)})")
    for finding in _decoded(target, texts):
        if not finding.holds and finding.difference is None:
            notes.append(f"not decoded ({finding.detail})")
        elif not finding.holds:
            faults.append(f"{finding.what}: {finding.detail}")
    if target.rollback is None:
        notes.append("verifies nothing: no proven rollback")
    return faults, notes


def _decoded(target: Target, texts: list[list[int]]) -> list[Finding]:
    """Plain decoding against Transformers' `generate`, and verifying where a rollback is proven."""
    check = DecodingCheck(target, texts, NEW_TOKENS)
    plain = tried("plain decoding", check.plain)
    if target.rollback is None or not plain.holds:
        return [plain]
    return [plain, tried("verifying, half of the drafts right", lambda: check.verified(2, 2))]


def _line(error: Exception) -> str:
    first = first_line(error)
    return first if isinstance(error, DeepSpecError) else f"{type(error).__name__}: {first}"[:200]


if __name__ == "__main__":
    main()
