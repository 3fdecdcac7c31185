"""What other trainers' flags are here: one table, which `rwkvflow import` goes by and docs/coming-from-other-tools.md shows.

`python -m flows.flags` prints the page's tables.
Sources: JL-er/RWKV-PEFT of June 2025, Joluck/RWKV-PEFT of January 2026, TrainChatGalRWKV of March 2024, BlinkDL/RWKV-LM
(RWKV-v4neo, RWKV-v5, RWKV-v7/train_temp), josStorer/RWKV-Runner of May 2026.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

TOOLS = {"P": "RWKV-PEFT 2025", "Q": "RWKV-PEFT 2026", "G": "TrainChatGal", "L": "RWKV-LM"}
"""By the letters that the table has for them."""

Fate = Literal["moved", "read", "dead", "left"]

FATES: dict[Fate, str] = {
    "moved": "",
    "read": "not needed: read from the model's file",
    "dead": "had no effect there",
    "left": "not here",
}


class Flag(NamedTuple):
    """One flag of one or more tools."""

    name: str
    tools: str
    fate: Fate
    home: str = ""
    """The setting that it became; several are separated by commas."""
    note: str = ""
    """What is different, or why it has no home. Told whenever a script has the flag."""
    value: Callable[[str], Any] | None = None
    """Makes the setting of the flag's text. None: it depends on other flags too, see `flows.import_script`."""
    default: str | None = None
    """What the tool takes where the script does not say, if that matters here."""


def _on(text: str) -> bool:
    return float(text) > 0


def _quantize(text: str) -> str:
    return {"4bit": "fp4"}.get(text, text)


FLAGS = (
    Flag("load_model", "PQGL", "moved", "model.base", "", str),
    Flag("n_layer", "PQGL", "read"),
    Flag("n_embd", "PQGL", "read"),
    Flag("dim_att", "PQGL", "read"),
    Flag("dim_ffn", "PQGL", "read"),
    Flag("head_size_a", "PQL", "read"),
    Flag("head_size", "L", "read"),
    Flag("head_size_divisor", "PQL", "moved", "model.head_size_divisor", "", float),
    Flag("my_testing", "PQGL", "read", "", "the version: x052, x060, x070, ..."),
    Flag("op", "PQ", "moved", "model.op", "auto takes the fastest that works on the machine", str),
    Flag("fla", "PQ", "dead"),
    Flag("fused_kernel", "PQ", "left", "", "model.op chooses the kernels; there it made the adapters of ffn "
         "ineffective"),
    Flag("compile", "L", "left", "", "model.op chooses the kernels"),
    Flag("quant", "PQ", "moved", "model.quantize", "in blocks of 64 numbers, where there int8 had one scale for "
         "a matrix; "
         "4bit was fp4; RWKV-PEFT 2026 reads the flag and does nothing", _quantize),
    Flag("pre_ffn", "PQGL", "left", "", "no published model has it"),
    Flag("head_qk", "PQGL", "left", "", "no published model has it"),
    Flag("tiny_att_dim", "PQGL", "left", "", "no published model has it"),
    Flag("tiny_att_layer", "PQGL", "left", "", "no published model has it"),
    Flag("dropout", "PQL", "dead", "", "a LoRA's own is adapter.dropout"),
    Flag("my_pos_emb", "PQGL", "dead"),
    Flag("my_att_shift", "PQGL", "dead"),
    Flag("my_ffn_shift", "PQGL", "dead"),
    Flag("load_partial", "PQGL", "dead"),
    # data
    Flag("data_file", "PQGL", "moved", "data.source, data.parts", "a binidx is read from its folder"),
    Flag("data_type", "PQGL", "moved", "data.parts", "the kind of the files; usually auto finds it"),
    Flag("vocab_size", "PQGL", "moved", "data.tokenizer", "65536 is world, 256 bytes; RWKV-4's Pile models need "
         "the path of their "
         "20B_tokenizer.json"),
    Flag("dataload", "PQ", "moved", "train.rows", "pad: there the rest of a row were the next documents' "
         "tokens, unlearned; here it "
         "is filling. get: windows at random places; here stream, which reads each token once"),
    Flag("loss_mask", "PQ", "moved", "data.parts", "the part's mask; qa learns the answers and that they end, "
         "and not the words "
         "'Assistant:'"),
    Flag("mask_id", "PQ", "moved", "data.parts", "the part's marks, with loss_mask se"),
    Flag("data_shuffle", "P", "moved", "train.order", "anew each epoch"),
    Flag("data_shuffle", "Q", "dead", "", "it always shuffles; train.order: as_given does not"),
    Flag("sft_field", "PQ", "moved", "data.parts", "the part's columns: instruction and output; World's "
         "dialogue format, not Alpaca's"),
    Flag("sft_split", "PQ", "left", "", "`rwkvflow data fetch` brings a data set's splits; data.parts chooses "
         "among its files"),
    Flag("train_split_ratio", "G", "moved", "data.holdout.fraction", "its rest was never measured; here what is "
         "held out is",
         lambda text: round(1 - float(text), 6)),
    Flag("train_data_sort", "G", "moved", "train.order", "by tokens",
         lambda text: {"shuffle": "shuffled"}.get(text, text)),
    Flag("select_name", "G", "left", "", "loss_mask se: set a part's mask to se and its marks"),
    Flag("instruct_data_file", "G", "left", "", "make it a part of data.parts"),
    Flag("instruct_data_ratio", "G", "left", "", "make it a part of data.parts, with its share in train.mix"),
    Flag("names_data_file", "G", "left", "", "put the names into the data"),
    Flag("my_script_mask", "G", "left", "", "set a part's mask to se and its marks"),
    Flag("my_script_align", "G", "dead", "", "it was retired there"),
    Flag("special_tokens_dict_path", "G", "left", "", "write its entries into data.special_tokens"),
    Flag("num_workers", "Q", "left", "", "rows are read as they are needed"),
    Flag("persistent_workers", "Q", "dead"),
    Flag("prefetch_factor", "Q", "dead"),
    Flag("my_sample_len", "PQGL", "dead"),
    Flag("my_qa_mask", "PQGL", "left", "", "set a part's mask to qa"),
    Flag("my_pile_version", "PQGL", "dead"),
    Flag("my_pile_shift", "PQGL", "dead"),
    Flag("my_random_steps", "PQGL", "dead"),
    # length
    Flag("ctx_len", "PQGL", "moved", "train.ctx_len", "", int, "1024"),
    Flag("micro_bsz", "PQGL", "moved", "train.micro_batch", "", int, "12"),
    Flag("accumulate_grad_batches", "PQGL", "moved", "train.accumulate", "", int, "1"),
    Flag("accumulate_grad_batches_dict", "G", "left", "", "one number holds for the whole run: train.accumulate"),
    Flag("epoch_steps", "PQGL", "moved", "train.steps", "a mini-epoch of so many micro-batches, and in "
         "RWKV-PEFT 2026 of so many "
         "documents from the front; an epoch here is all of the data, once (train.epochs)"),
    Flag("epoch_count", "PQGL", "moved", "train.steps", "mini-epochs; the steps of all of them are counted together"),
    Flag("epoch_begin", "PQGL", "left", "", "it named files and moved the schedule, and continued nothing; here "
         "a run that was "
         "stopped goes on by itself"),
    Flag("previous_step", "G", "left", "", "a run that was stopped goes on by itself"),
    Flag("log_add_step", "G", "left", "", "a continued run has one curve"),
    Flag("my_exit_tokens", "PQ", "dead"),
    Flag("my_exit_tokens", "GL", "moved", "train.tokens"),
    Flag("magic_prime", "PQ", "left", "", "that order is gone from the tool; train.rows: magic_prime has it"),
    Flag("magic_prime", "GL", "moved", "train.rows", "found from the data; once through all rows"),
    Flag("my_exit", "PQGL", "left", "", "train.steps says when a run ends"),
    Flag("my_pile_stage", "PQGL", "moved", "train.optimizer.rates", "2: rates of its own; 1 made first values, "
         "which is no training"),
    Flag("train_stage", "L", "moved", "train.optimizer.rates", "as my_pile_stage"),
    Flag("my_pile_edecay", "PQGL", "left", "", "the schedule is of the whole run"),
    Flag("random_seed", "PQGL", "moved", "seed", "-1 was a new one each time; here a run always has one"),
    # optimizer
    Flag("lr_init", "PQGL", "moved", "train.optimizer.lr", "", float, "6e-4"),
    Flag("lr_final", "PQGL", "moved", "train.optimizer.lr_final", "reached in the last step; RWKV-PEFT's wsd "
         "went to 0 whatever it was",
         float, "1e-5"),
    Flag("lr_schedule", "PQ", "moved", "train.optimizer.lr_final, train.optimizer.warmup_steps",
         "cos is schedule: cosine. wsd was that too, to 0 and after a warm-up, with nothing stable in it; schedule: wsd is the "
         "true one"),
    Flag("warmup_steps", "P", "moved", "train.optimizer.warmup_steps", "of --lr_schedule wsd alone; there from 0"),
    Flag("warmup_steps", "Q", "moved", "train.optimizer.warmup_steps, train.optimizer.warmup_from",
         "from 0.01 of lr; with --lr_schedule wsd 100 steps from 0, whatever it says"),
    Flag("warmup_steps", "GL", "moved", "train.optimizer.warmup_steps, train.optimizer.warmup_from",
         "from 0.01 of lr in RWKV-LM 7, from 0.2 before it and in TrainChatGal"),
    Flag("beta1", "PQGL", "moved", "train.optimizer.betas", "", None, "0.9"),
    Flag("beta2", "PQGL", "moved", "train.optimizer.betas", "", None, "0.99"),
    Flag("adam_eps", "PQGL", "moved", "train.optimizer.eps", "", float, "1e-8"),
    Flag("weight_decay", "PQGL", "moved", "train.optimizer.weight_decay", "on large matrices alone, as "
         "there", float, "0"),
    Flag("weight_decay_final", "PQGL", "left", "", "the decay stays as it is; RWKV-PEFT stops with an error "
         "where it is above 0"),
    Flag("layerwise_lr", "PQGL", "moved", "train.optimizer.layerwise_lr", "", _on, "1"),
    Flag("grad_clip", "L", "moved", "train.optimizer.grad_clip", "always 1 in the other tools", float, "1"),
    Flag("optim", "P", "left", "", "adam_mini stops with an error there; train.optimizer.kind has others"),
    Flag("optimizer", "Q", "left", "", "muon stops with an error there; here train.optimizer.kind: muon works"),
    Flag("precision", "PQGL", "moved", "train.precision", "states and loss are float32 under all; the others' "
         "kernels take bf16 alone",
         str, "bf16"),
    Flag("avg_loss", "PQ", "dead", "", "it kept a running mean between steps"),
    # method
    Flag("peft", "PQ", "moved", "adapter.kind", "none is full; disha is bone or bat; miss is bone; merging is a "
         "stage of its own"),
    Flag("train_type", "PQ", "moved", "adapter.kind", "state: a tuned state, alone or beside an adapter; "
         "infctx: see chunk_ctx"),
    Flag("train_parts", "P", "moved", "adapter.also", "parts of names there, patterns of names in a block here; "
         "RWKV-7 has nothing "
         "called time"),
    Flag("lora_config", "P", "moved", "adapter.rank, adapter.alpha, adapter.dropout, adapter.load"),
    Flag("pissa_config", "P", "moved", "adapter.rank, adapter.iterations, adapter.load, adapter.load_init"),
    Flag("disha_config", "P", "moved", "adapter.kind, adapter.rank, adapter.load", "its mode is the kind; its "
         "default mode trains "
         "nothing there"),
    Flag("bone_config", "P", "moved", "adapter.kind, adapter.rank, adapter.load", "bone_mode, bone_load and "
         "bone_r, of before "
         "February 2025"),
    Flag("peft_config", "Q", "moved", "adapter.rank, adapter.alpha, adapter.dropout", "for lora and miss; "
         "others are adapter.kind: peft"),
    Flag("lora_config", "Q", "dead", "", "peft_config is what counts there"),
    Flag("pissa_config", "Q", "dead", "", "peft_config is what counts there"),
    Flag("miss_config", "Q", "dead", "", "peft_config is what counts there"),
    Flag("merge", "Q", "left", "", "the merge stage writes the merged model, the train stage the adapter"),
    Flag("lora", "G", "moved", "adapter.kind", "without it, all is trained"),
    Flag("lora_r", "G", "moved", "adapter.rank"),
    Flag("lora_alpha", "G", "moved", "adapter.alpha", "kept in our files: a merge asks for it no more"),
    Flag("lora_dropout", "G", "moved", "adapter.dropout"),
    Flag("lora_load", "G", "moved", "adapter.load"),
    Flag("lora_parts", "G", "moved", "adapter.targets, adapter.also", "ln and time also where layers leave "
         "blocks out, as there"),
    Flag("lora_layers", "G", "moved", "adapter.layers"),
    # of the engine
    Flag("grad_cp", "PQGL", "moved", "train.context.grad_cp", "blocks are made again in the backward pass; never the number of "
         "accumulated batches, as some pages say", _on),
    Flag("chunk_ctx", "PQ", "moved", "train.context.segment", "with train_type infctx, which cuts the gradient at each "
         "chunk: train.context.bptt is 1, and exact has all of it"),
    Flag("ctx_parts", "G", "moved", "train.context.parts", "with state_cp train.context.segment, the rows' parts"),
    Flag("state_cp", "G", "moved", "train.context.segment", "the exact gradient, unlike infctx's"),
    Flag("initial_ctx_len", "G", "moved", "train.context.initial_ctx_len", "rows are cut into windows, and no token is lost"),
    Flag("ctx_warmup_steps", "G", "moved", "train.context.ctx_warmup_steps", "a continued run goes on with it"),
    Flag("accelerator", "PQGL", "left", "", "a GPU is used where there is one"),
    Flag("devices", "PQGL", "moved", "train.parallel.devices"),
    Flag("num_nodes", "PQGL", "moved", "train.parallel.nodes"),
    Flag("strategy", "PQGL", "moved", "train.parallel.strategy", "one device needs none but for DeepSpeed's offload"),
    Flag("ds_bucket_mb", "PQGL", "moved", "train.parallel.bucket_mb"),
    Flag("epoch_save", "PQGL", "moved", "train.saves.every", "in optimizer steps; with DeepSpeed the last alone is kept"),
    Flag("proj_dir", "PQGL", "left", "", "results are in outputs/, runs in .rwkvflow/"),
    Flag("wandb", "PQGL", "moved", "tracking.also", "beside MLflow; needs the extra wandb"),
    Flag("enable_progress_bar", "L", "left", "", "there is a bar on a terminal, and a line now and then elsewhere"),
    Flag("debug", "G", "left", "", "outputs/preview shows what is learned"),
)  # fmt: skip

RUNNER = (
    ("数据路径", "Data Path", "data_file"),
    ("词表路径", "Vocab Path", "vocab_size"),
    ("基底模型", "Base Model", "load_model"),
    ("LoRA 模型", "LoRA Model", "lora_load"),
    ("显卡数量", "Devices", "devices"),
    ("精度", "Precision", "precision"),
    ("梯度检查点标志", "Gradient Checkpoint", "grad_cp"),
    ("上下文长度", "Context Length", "ctx_len"),
    ("每轮训练步数", "Epoch Steps", "epoch_steps"),
    ("训练轮次", "Epoch Count", "epoch_count"),
    ("起始轮次", "Epoch Begin", "epoch_begin"),
    ("保存间隔轮次", "Epoch Save", "epoch_save"),
    ("初始学习率", "Learning Rate Init", "lr_init"),
    ("最终学习率", "Learning Rate Final", "lr_final"),
    ("微批次大小", "Micro Batch Size", "micro_bsz"),
    ("梯度累积批次", "Accumulate Gradient Batches", "accumulate_grad_batches"),
    ("学习率预热步数", "Warmup Steps", "warmup_steps"),
    ("Adam Epsilon", "Adam Epsilon", "adam_eps"),
    ("Beta 1", "Beta 1", "beta1"),
    ("Beta 2", "Beta 2", "beta2"),
    ("LoRA R", "LoRA R", "lora_r"),
    ("LoRA Alpha", "LoRA Alpha", "lora_alpha"),
    ("LoRA Dropout", "LoRA Dropout", "lora_dropout"),
    ("前馈网络预处理", "Pre-FFN", "pre_ffn"),
    ("Head QK", "Head QK", "head_qk"),
)
"""Fields of RWKV Runner's training page, in Chinese and English, and the flags of TrainChatGal's kind that they are."""


def flags_of(tool: str) -> dict[str, Flag]:
    """The flags of a tool, by name; `tool` is its letter."""
    return {flag.name: flag for flag in FLAGS if tool in flag.tools}


def new_home(flag: Flag) -> str:
    """Where a flag has gone, for a reader."""
    return ", ".join(f"`{name}`" for name in flag.home.split(", ")) if flag.home else FATES[flag.fate]


def tables() -> str:
    """Both tables, as Markdown."""
    lines = ["| flag | of | here | |", "| --- | --- | --- | --- |"]
    lines += [
        f"| `--{flag.name}` | {', '.join(TOOLS[tool] for tool in flag.tools)} | {new_home(flag)} | {flag.note} |"
        for flag in sorted(FLAGS)
    ]
    known = {flag.name: flag for flag in FLAGS}
    lines += ["", "| RWKV Runner's field | is the flag | here |", "| --- | --- | --- |"]
    lines += [
        f"| {chinese if chinese == english else f'{chinese}, {english}'} | `--{name}` | {new_home(known[name])} |"
        for chinese, english, name in RUNNER
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(tables(), end="")
