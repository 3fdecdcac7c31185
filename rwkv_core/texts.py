"""The fixed texts of the evaluation's report, in English and in Chinese: one table, of which pages and markdown take theirs."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

from markupsafe import Markup, escape

LANGUAGES = ("en", "zh")


class Text(NamedTuple):
    """The same in each language. A template shows both, each marked with its language, and the page's style hides one."""

    en: str
    zh: str

    @classmethod
    def same(cls, words: object) -> Self:
        """What is no matter of language: a number, a name."""
        return cls(str(words), str(words))

    def __call__(self, **values: object) -> "Text":
        """With its blanks filled in; a value that is a `Text` is taken in the same language."""
        return Text(*(one.format(**{k: _in(v, i) for k, v in values.items()}) for i, one in enumerate(self)))

    def __html__(self) -> Markup:
        return self.marked("span")

    def marked(self, tag: str) -> Markup:
        """As markup, all that is special in it escaped: in each language an element `tag`, or text alone if they are equal."""
        if self.en == self.zh:
            return escape(self.en)
        return Markup("").join(
            Markup('<{0} lang="{1}">{2}</{0}>').format(Markup(tag), Markup(language), words)
            for language, words in zip(LANGUAGES, self, strict=True)
        )


def joined(texts: Iterable[Text], marks: tuple[str, str] = (", ", "、")) -> Text:
    """An enumeration, with these marks between."""
    english, chinese = zip(*texts, strict=True)
    return Text(marks[0].join(english), marks[1].join(chinese))


def _in(value: object, language: int) -> Any:
    return value[language] if isinstance(value, Text) else value


TEXTS: Mapping[str, Text] = {
    name: Text(*both)
    for name, both in {
        # the page
        "title": ("Evaluation", "评测报告"),
        "title_of": ("The tuned model against its base", "微调模型与基座模型的对比"),
        "language": ("Language", "语言"),
        "summary": ("In short", "结论"),
        "next": ("What to do next", "下一步"),
        "unmeasured": ("What was not measured", "没有测量的内容"),
        "measures": ("Measures", "指标"),
        "pictures": ("Curves", "曲线"),
        "samples": ("Samples", "样例"),
        "samples_words": (
            "The same prompt, both models. Marked is what only one of them wrote; where they share little, nothing is.",
            "同一提示词，两个模型各自的续写。只有其中一方写出的内容会被标记；若相同之处很少，则不作标记。",
        ),
        "no_samples": ("None were asked for.", "没有要求生成样例。"),
        "nothing": ("(nothing)", "（空）"),
        "made_of": ("What it was made of", "数据与参数"),
        "lineage": ("Where it comes from", "来源"),
        "footer": (
            "Written by RWKV-Flow. This page loads nothing from the network.",
            "由 RWKV-Flow 生成。本页面不访问网络。",
        ),
        # the headline
        "is_better": ("Better than its base", "优于基座模型"),
        "is_worse": ("Worse than its base", "劣于基座模型"),
        "is_same": ("No difference from its base could be shown", "未能证明与基座模型有差异"),
        "is_mixed": ("Better on the held-out documents, worse on other measures", "留出文档上更好，其他指标变差"),
        "is_better_but": ("Better on some measures; no difference shown in its loss", "部分指标变好；损失未显示差异"),
        "is_worse_but": ("Worse on some measures, and no better in its loss", "部分指标变差；损失也没有变好"),
        "few": ("Too few documents for a verdict", "文档太少，无法下结论"),
        # sentences of the summary
        "held_out_is": (
            "On {documents} held-out documents ({tokens} tokens) the tuned model is {word} its base: the loss goes from {base} "
            "to {tuned} nats a token, a change of {change} ({confidence} interval {low} to {high}).",
            "在 {documents} 个留出文档（{tokens} 个词元）上，微调模型{word}基座模型：每词元损失从 {base} 变为 {tuned} 奈特，"
            "变化 {change}（{confidence} 区间 {low} 至 {high}）。",
        ),
        "held_out_few": (
            "On {documents} held-out documents ({tokens} tokens), too few for a verdict, the loss goes from {base} to {tuned} "
            "nats a token, a change of {change} ({confidence} interval {low} to {high}).",
            "在 {documents} 个留出文档（{tokens} 个词元）上，每词元损失从 {base} 变为 {tuned} 奈特，变化 {change}"
            "（{confidence} 区间 {low} 至 {high}）；文档太少，无法下结论。",
        ),
        "better_than": ("better than", "优于"),
        "worse_than": ("worse than", "劣于"),
        "same_as": ("not distinguishable from", "无法区别于"),
        "perplexity_is": (
            "In other words, it chooses each token as if among {tuned} that are equally likely; the base, among {base}.",
            "换言之，它预测每个词元时如同在 {tuned} 个等可能的选项中选择，而基座模型是 {base} 个。",
        ),
        "few_documents": (
            "{documents} documents are too few for a verdict, whatever the numbers say: {fewest} are the least.",
            "只有 {documents} 个文档，无论数字如何都不足以下结论：至少需要 {fewest} 个。",
        ),
        "not_scored": (
            "{count} held-out documents have no token to learn, and are left out.",
            "有 {count} 个留出文档没有需要学习的词元，未计入。",
        ),
        "group_is": ("{group}: {parts}.", "{group}：{parts}。"),
        "better_on": ("better on {names}", "{names}变好"),
        "worse_on": ("worse on {names}", "{names}变差"),
        "same_on": ("no difference shown on {names}", "{names}未显示差异"),
        "few_on": (
            "too few items for a verdict on {names} (fewer than {fewest})",
            "{names}的条目太少（不足 {fewest} 个），不下结论",
        ),
        "forgotten": (
            "It has forgotten some of what the base knew: {names}.",
            "它遗忘了基座模型原有的部分能力：{names}。",
        ),
        "loss_rises": (
            "the loss on {name} rises by {change} ({low} to {high})",
            "{name}的损失上升 {change}（{low} 至 {high}）",
        ),
        "not_forgotten": (
            "No forgetting was found: the loss on {name} rises by {high} nats a token at most.",
            "没有发现遗忘：{name}的损失最多上升 {high} 奈特/词元。",
        ),
        "not_forgotten_below": (
            "No forgetting was found: the loss on {name} falls.",
            "没有发现遗忘：{name}的损失下降。",
        ),
        "forgetting_open": (
            "Whether it forgets is open: {name} has too few items for a verdict.",
            "是否遗忘尚无定论：{name}的条目太少。",
        ),
        "from_to": ("{name} ({base} to {tuned})", "{name}（{base} 变为 {tuned}）"),
        "chance": (
            "{count} measures were compared. Of so many, about {expected} would seem to change by chance alone.",
            "共比较了 {count} 项指标。仅凭偶然，其中约有 {expected} 项会显得有变化。",
        ),
        "overfitted": (
            "During training the held-out loss was lowest at step {step} of {last} ({lowest}), and rose to {end} after it: "
            "the model overfits.",
            "训练中留出损失在第 {step} 步（共 {last} 步）最低（{lowest}），此后升至 {end}：模型过拟合。",
        ),
        "cost": (
            "It cost {steps} steps of training over {tokens} tokens, {time}; the adapter has {size}.",
            "训练共 {steps} 步、{tokens} 个词元，用时 {time}；适配器大小 {size}。",
        ),
        "minutes": ("{count} min", "{count} 分钟"),
        "hours": ("{count} h", "{count} 小时"),
        "seconds": ("{count} s", "{count} 秒"),
        # advice
        "do_use": (
            "Try it on questions of your own, then let the gate decide: `rwkvflow chat` and `rwkvflow promote`.",
            "先用自己的问题试一试，再由准入检查决定是否启用：`rwkvflow chat` 与 `rwkvflow promote`。",
        ),
        "do_weigh": (
            "Weigh the gain against what was lost. To keep more: mix general rows into the data, or train with a lower "
            "learning rate or for fewer steps.",
            "请权衡所得与所失。若要少遗忘：在数据中混入通用文本，降低学习率，或减少训练步数。",
        ),
        "do_not_use": (
            "Do not use it. Look at the curve: a held-out loss that rises calls for fewer epochs or a lower learning rate; "
            "one that hardly moves, for another learning rate or more data.",
            "不要使用它。请查看曲线：留出损失上升，说明应减少轮数或降低学习率；几乎不动，说明应调整学习率或增加数据。",
        ),
        "do_more": (
            "Hold out more documents (`data.holdout.fraction`) to see smaller differences, or train longer.",
            "留出更多文档（`data.holdout.fraction`）以看清更小的差异，或延长训练。",
        ),
        "do_stop": (
            "Stop earlier: about step {step}. `train.stop_early` can do so by itself; saves of about that step are in "
            "`outputs/train/saves`, if they were asked for.",
            "更早停止训练：约在第 {step} 步。`train.stop_early` 可自动停止；若要求了保存，附近的文件在 `outputs/train/saves`。",
        ),
        "do_recite": (
            "See whether the training text may be repeated in public; duplicates in the data make it worse.",
            "请确认训练文本可以被公开复述；数据中的重复会加重这一问题。",
        ),
        "do_measure": (
            "Measure what is missing before you rely on it; docs/evaluation.md says how.",
            "在依赖它之前，请补上缺少的测量；方法见 docs/evaluation.md。",
        ),
        # tables
        "measure": ("measure", "指标"),
        "base": ("base", "基座"),
        "tuned": ("tuned", "微调"),
        "change": ("change", "变化"),
        "interval": ("{confidence} interval", "{confidence} 区间"),
        "range": ("{low} to {high}", "{low} 至 {high}"),
        "count": ("items", "条目"),
        "verdict": ("verdict", "判断"),
        "picture": ("base and tuned", "基座与微调"),
        "better": ("better", "更好"),
        "worse": ("worse", "更差"),
        "same": ("no difference shown", "未显示差异"),
        "too_few": ("too few items", "条目太少"),
        "lower": ("lower is better", "越低越好"),
        "higher": ("higher is better", "越高越好"),
        "interval_words": (
            "The interval is that of the change, by drawing the items again and again (paired bootstrap). If it lies on one "
            "side of 0, the change is more than chance. pp: percentage points.",
            "区间指变化量的区间，由对条目反复抽样得到（配对自助法）。若区间完全在 0 的一侧，则变化不能用偶然解释。pp：百分点。",
        ),
        "bars_words": (
            "Bars: grey the base, blue the tuned model; the thin line is the interval of the change, at the tuned model's end.",
            "条形：灰色为基座，蓝色为微调模型；细线为变化量的区间，画在微调模型的末端。",
        ),
        # groups and measures
        "held_out": ("Held-out documents", "留出文档"),
        "sources": ("By source", "按来源"),
        "general": ("General text", "通用文本"),
        "answers": ("Answers", "回答"),
        "format": ("Form of the answers", "回答格式"),
        "memorised": ("Memorisation", "记忆"),
        "tasks": ("Tasks", "任务"),
        "lm_eval": ("lm-eval", "lm-eval"),
        "about_sources": ("loss on the held-out documents of each source", "各来源留出文档上的损失"),
        "about_general": ("loss on text that has nothing to do with the training", "与训练无关的文本上的损失"),
        "about_answers": ("whether questions with a known answer are answered rightly", "有标准答案的问题是否答对"),
        "about_format": ("whether answers end by themselves and keep to their role", "回答是否自行结束、是否守住角色"),
        "about_memorised": ("how much training text it repeats word for word", "逐字复述训练文本的程度"),
        "about_tasks": ("task files of your own", "自备的任务文件"),
        "about_lm_eval": ("public benchmarks, by lm-eval", "由 lm-eval 运行的公开基准"),
        "loss": ("loss, nats a token", "损失（奈特/词元）"),
        "perplexity": ("perplexity", "困惑度"),
        "bits_per_byte": ("bits a byte", "每字节比特数"),
        "general.loss": ("general text", "通用文本"),
        "answers.exact_match": ("exactly right", "完全正确"),
        "answers.f1": ("words in common with the right answer (F1)", "与标准答案的词重合度（F1）"),
        "answers.choice_acc": ("right choice", "选择正确"),
        "answers.choice_acc_norm": ("right choice, by its length", "选择正确（按长度归一）"),
        "format.ends": ("ends by itself", "自行结束"),
        "format.one_turn": ("keeps to its own turn", "只说自己的一轮"),
        "format.plain_colons": ("no fullwidth colon after a role", "角色后没有全角冒号"),
        "memorised.verbatim": ("passages continued word for word", "逐字续写的段落"),
        # curves
        "loss_curve": ("Loss during training", "训练过程中的损失"),
        "loss_curve_words": (
            "Faint: each step. Solid: their running mean. Points: the held-out loss.",
            "浅色：每一步。实线：滑动平均。圆点：留出损失。",
        ),
        "positions": ("Loss by position in the context", "按上下文位置的损失"),
        "positions_words": (
            "How well a token is predicted, by its place in the document; shaded is the interval of the change.",
            "按词元在文档中的位置统计的预测损失；阴影为变化量的区间。",
        ),
        "documents": ("Every held-out document", "每个留出文档"),
        "documents_words": (
            "A point is a document; below the line the tuned model is better ({below} of {count}).",
            "每个点是一个文档；在线下方表示微调模型更好（{count} 个中有 {below} 个）。",
        ),
        "no_curve": ("There is nothing to draw.", "没有可画的内容。"),
        "step": ("optimizer step", "优化器步数"),
        "nats": ("nats a token", "奈特/词元"),
        "position": ("place of the token", "词元位置"),
        "with_base": ("base, nats a token", "基座，奈特/词元"),
        "with_tuned": ("tuned, nats a token", "微调，奈特/词元"),
        "training": ("training", "训练"),
        "held_out_line": ("held out", "留出"),
        "no_change": ("no change", "无变化"),
        "tokens": ("tokens", "词元"),
        # facts
        "data": ("Data", "数据"),
        "model": ("Model", "模型"),
        "settings": ("Training", "训练"),
        "source": ("source", "来源文件"),
        "rows": ("rows", "行数"),
        "trained_on": ("training", "训练部分"),
        "held_out_of": ("held out", "留出部分"),
        "documents_tokens": ("{documents} documents, {tokens} tokens", "{documents} 个文档，{tokens} 个词元"),
        "split_by": ("split by", "划分依据"),
        "text": ("text", "文本"),
        "base_file": ("base", "基座"),
        "shape": ("shape", "规模"),
        "shape_is": ("RWKV-{version}, {layers} layers, width {width}", "RWKV-{version}，{layers} 层，宽度 {width}"),
        "method": ("method", "方法"),
        "trained": ("trained", "训练的部分"),
        "trained_layers": ("{names}; layers: {layers}", "{names}；层：{layers}"),
        "initial_state": ("the initial state ({kind})", "初始状态（{kind}）"),
        "frozen": ("frozen matrices kept in", "冻结矩阵的精度"),
        "full": ("full", "全精度"),
        "begun": ("begun from", "起点"),
        "own_values": ("the method's own values", "方法自身的初值"),
        "length": ("length", "长度"),
        "epochs": ("{count} epochs", "{count} 轮"),
        "steps": ("{count} steps", "{count} 步"),
        "count_tokens": ("{count} tokens", "{count} 个词元"),
        "row_making": ("rows are", "行的组成"),
        "state_carried": ("state carried", "状态延续"),
        "tokens_a_step": ("tokens a step", "每步词元数"),
        "rate": ("learning rate", "学习率"),
        "rate_is": ("{first} to {last}, {schedule}", "{first} 至 {last}，{schedule}"),
        "seed": ("seed", "随机种子"),
        "peak": ("peak memory", "内存峰值"),
        "time": ("time in training", "训练用时"),
        # lineage
        "base_hash": ("base, sha256", "基座 sha256"),
        "tuned_hash": ("tuned model, sha256", "微调模型 sha256"),
        "state_hash": ("mounted state, sha256", "挂载状态 sha256"),
        "adapter_hash": ("adapter, sha256", "适配器 sha256"),
        "data_hash": ("data, sha256", "数据 sha256"),
        "receipt_hash": ("merge receipt, sha256", "合并凭据 sha256"),
        "commit": ("git commit", "git 提交"),
        "changed": ("{commit}, with changes that are not committed", "{commit}，有未提交的修改"),
        "no_commit": ("none: not in a repository", "无：不在仓库中"),
        "run": ("run", "训练记录"),
        "experiment": ("DVC experiment", "DVC 实验"),
        "host": ("machine", "机器"),
        "versions": ("made with", "软件版本"),
    }.items()
}
