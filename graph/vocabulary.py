"""The words for how to train, and the spec keys they mean. A table: to teach a phrase, add a line.

Rules are tried at every word and the longest hit wins, so that "gradient checkpointing" is never a checkpoint and
"500 warm-up steps" never the length of the training. Keys with a dot are spec keys; intake.py reads the others.
"""

from __future__ import annotations

from tunesmith.graph.rules import Hit, Rule, fraction, lead, say, tail, tokens, value

ROWS = (
    "(?:rows?|examples?|samples?|records?|lines?|items?|entries|conversations?|dialog(?:ue)?s?|instances?|data_points?|"
    "pairs?|questions?|problems?|tickets?|documents?|messages?|chats?|e_?mails?)"
)
OFF = "(?:no|without(?: any)?|disable|skip|don't use|do not use|don't|do not|turn off|not|never)"
STEPS = "(?:training |train |optimi[sz]er |optimi[sz]ation |gradient )?(?:steps?|iterations?|iters?|updates?)"
WITH = lead("with a an and using use the enable turn on")
OVER = "(?: (?:over|through|on|of) " + lead("the my our all of full whole") + "\\w+)?"


def bits(hit: Hit) -> str | None:
    """ "4-bit" weights are QLoRA; other widths are not offered."""
    return "qlora" if hit.number().value == 4 else None


def kind(hit: Hit) -> str:
    """The word in the slot `kind`, in lower case."""
    return (hit.group("kind") or "").lower().replace(" ", "_").replace("-", "_")


def lora_rank(hit: Hit) -> dict[str, object]:
    """ "LoRA rank 16"."""
    return {"adapter.kind": "lora", "adapter.rank": value(hit)}


def pair_loss(hit: Hit) -> str:
    """A loss of preference pairs by its name, with the ending that people leave out."""
    name = kind(hit)
    endings = {"exo": "exo_pair", "nca": "nca_pair", "bco": "bco_pair", "sppo": "sppo_hard", "apo": "apo_zero"}
    return endings.get(name, name)


def student(hit: Hit) -> dict[str, object]:
    """ "Distil A from B": the other model that is named is the teacher."""
    return {"method": "distill", "student": hit.refs[0] if hit.refs else hit.group("W")}


def teacher(hit: Hit) -> dict[str, object]:
    """ "Distil B into A"."""
    return {"method": "distill", "distill.teacher": hit.group("W")}


def samples(hit: Hit) -> dict[str, object]:
    """ "8 generations of 64 tokens"."""
    return {"grpo.num_generations": value(hit), "grpo.max_completion": hit.number("N2").plain}


def both(hit: Hit) -> dict[str, int | float]:
    """ "Evaluate and checkpoint every 100 steps"."""
    return {"train.save_steps": value(hit), "train.eval_steps": value(hit)}


METHOD_RULES: tuple[Rule, ...] = (
    *say(
        "method",
        "sft",
        "sft",
        "supervised(?: (?:fine_tun\\w+|learning|training))?",
        "(?:for )?instruct(?:ion)?s?_(?:tun\\w+|follow\\w+|fine_tun\\w+)",
        "(?:continued |continual |further )pre_?train\\w*",
        "domain adapt\\w+",
    ),
    *say(
        "method",
        "dpo",
        "dpo",
        "direct preference(?: optimi[sz]ation)?",
        "preference_(?:tun\\w+|optimi[sz]\\w+|fine_tun\\w+|learning|training|alignment)",
    ),
    *say("", {"method": "dpo", "dpo.loss": "ipo"}, "ipo(?! loss)"),
    *say("method.weak", "dpo", "align(?:ing|ment)?", "(?:human )?preferences?(?: data| pairs)?"),
    *say(
        "method",
        "grpo",
        "grpo",
        "group relative policy optimi[sz]ation",
        "reinforcement(?: learning| fine_tuning)?",
        "rlvr",
        "rlhf",
        "rft",
        "rl",
    ),
    *say("method.weak", "grpo", "(?:with |using )?(?:a |an |verifiable |the )*rewards?(?: functions?)?"),
    *say("method", "kto", "kto", "kahneman_tversky(?: optimi[sz]ation)?"),
    *say(
        "method.weak", "kto", "thumbs?_up(?:(?: and | or |/)thumbs?_down)?(?: data| labels)?", "unpaired preferences?"
    ),
    *say("method", "rloo", "rloo"),
    *say("method", "reward", f"{WITH}(?:a )?reward_model(?:l?ing)?"),
    *say("method", "distill", "distil(?:l|lation|ling)?", "knowledge distillation"),
    *say("", student, "distil(?:l|ling)? (?:the |my )?{W} from"),
    *say("", teacher, "distil(?:l|ling)? (?:(?:the )?knowledge (?:from|of) )?(?:the |my )?{W} (?:in)?to"),
    *say("method.unknown", lambda hit: hit.words, "(?:ppo|orpo|simpo|cpo|gspo|bco|reinforce\\+\\+|nash_?md|xpo)"),
)

ADAPTER_RULES: tuple[Rule, ...] = (
    *say("adapter.kind", "qlora", f"{WITH}q_?lora(?: adapters?)?"),
    *say(
        "adapter.kind",
        bits,
        f"{WITH}(?:in )?{{N}}_bits?(?: lora| quanti[sz]\\w+| weights| loading| precision| base)?",
        "(?:load in|nf|int){N}_?(?:bits?)?",
    ),
    *say("adapter.kind", "dora", f"{WITH}dora(?: adapters?)?"),
    *say(
        "adapter.kind",
        "lora",
        f"{WITH}(?:lora|low_rank adaptation|low_rank adapters?)(?: adapters?)?",
        "(?:with|train|using|use) (?:an |a |the )?adapters?",
        "peft",
    ),
    *say(
        "adapter.kind",
        "none",
        "full_(?:(?:weights?|parameters?|params?|models?|rank)_)?(?:fine_?tun\\w+|ft|training|sft|tuning)",
        "full(?:ly)? (?:fine_tune|train)",
        "(?:train|update|tune) (?:all|all of)(?: the| its)? (?:full )?(?:weights|parameters|params|layers)",
        "(?:all|full)(?: the| its)? (?:weights|parameters|params)",
        f"{OFF} (?:a |an |the )?(?:lora|adapters?|peft)",
        "fft",
    ),
    *say("adapter.rank", value, f"{WITH}(?:rank|r){{IS}}{{N}}", "{N}_rank"),
    *say(
        "",
        lora_rank,
        f"{WITH}lora_(?:adapters? )?(?:with |of )?(?:a )?(?:rank|r|dim(?:ension)?){{IS}}{{N}}",
        "{N} (?:rank lora|lora rank)",
    ),
    *say("adapter.alpha", value, f"{WITH}(?:lora_)?alpha{{IS}}{{N}}", "{N} alpha"),
    *say("adapter.dropout", value, f"{WITH}(?:lora_)?dropout{{IS}}{{A}}", "{P} dropout"),
    *say("adapter.dropout", 0, f"{OFF} dropout"),
)

LENGTH_RULES: tuple[Rule, ...] = (
    *say(
        "train.epochs",
        value,
        f"(?:for )?{{N}}_(?:full |complete )?(?:training )?(?:epochs?|passes|pass){OVER}",
        "(?:number of |n_|num_(?:train_)?|max_|for )?epochs?{IS}{N}",
        f"{{N}} times{OVER}",
    ),
    *say("train.epochs", 1, "(?:for )?an epoch", "(?:one time|once) (?:over|through) (?:the |all |my )*\\w+"),
    *say("train.epochs", 0.5, "(?:for )?{F} (?:an )?epochs?"),
    *say(
        "train.max_steps",
        value,
        lead("for max maximum at most only just of about a total", 4) + f"{{N}}_{STEPS}",
        "(?:max_|num_|n_|total_|number of )?(?:train(?:ing)?_)?(?:steps|iterations){IS}{N}",
        "(?:stop|end) (?:after|at) (?:step )?{N}(?: steps?)?",
    ),
    *say(
        "train.save_steps",
        value,
        lead("with and save saving write make take store do keep a the model create put", 4)
        + "(?:checkpoint(?:s|ing|ed)?|save|saving|snapshots?)"
        + tail("it the model a an checkpoint checkpoints", 3)
        + f" (?:each|every|after every) {{N}}_{STEPS}",
        f"every {{N}}_{STEPS},? (?:save|checkpoint|write|make)" + tail("a the checkpoint checkpoints model", 3),
        "(?:save|checkpoint)_(?:steps|every|interval){IS}{N}",
        "(?:and )?(?:sav(?:e|ing)|checkpoint(?:s|ing)?) every {N}",
    ),
    *say(
        "",
        both,
        f"(?:eval\\w*|validat\\w+) (?:and|&) (?:checkpoint|sav)\\w* (?:each|every) {{N}}_{STEPS}",
        f"(?:checkpoint|sav)\\w* (?:and|&) (?:eval|validat)\\w* (?:each|every) {{N}}_{STEPS}",
    ),
    *say(
        "train.eval_steps",
        value,
        "(?:eval(?:uat\\w+)?|validat\\w+|test)"
        + tail("it the model loss on held_out data rows", 4)
        + f" (?:each|every|after every) {{N}}_{STEPS}",
        "eval_(?:steps|every|interval){IS}{N}",
    ),
    *say(
        "train.warmup_steps",
        value,
        f"{WITH}{{N}}_(?:steps? (?:of )?)?warm_?up(?: steps?)?",
        f"{WITH}warm_?up(?:_steps?)?(?: for| over)?{{IS}}{{N}}(?: steps?)?",
    ),
    *say("train.warmup_steps", 0, f"{OFF} warm_?up(?: steps?)?"),
    *say(
        "warmup",
        fraction,
        f"{WITH}warm_?up(?:_ratio| share| fraction)?(?: for| over)?{{IS}}(?:the )?(?:first )?{{P}}"
        + tail("of the all training steps", 4),
        f"{WITH}warm_?up_(?:ratio|share|fraction){{IS}}{{A}}",
        f"{WITH}{{P}} (?:linear )?warm_?up",
    ),
    *say(
        "train.max_length",
        tokens,
        WITH + "(?:max(?:imum|imal)?_?)?(?:seq(?:uence)?_?)?(?:len(?:gth)?|context(?: window| length| size)?|ctx)"
        "{IS}{N}(?: tokens?)?",
        "max(?:imum)?_(?:seq(?:uence)?s?|tokens?){IS}{N}(?: tokens?)?",
        "seq(?:uence)?s?(?: of)? {N}(?: tokens?)?",
        lead("up to at most max maximum of a with", 4)
        + "{N}_tokens?"
        + tail("long max maximum context length window", 2),
        "(?:cut|truncat\\w+|trim\\w*|shorten)" + tail("it rows them at to after everything") + " {N}(?: tokens?)?",
        "{N} (?:context(?: window| length)?|ctx|(?:max_)?seq(?:uence)?_?len(?:gth)?|sequence length)",
    ),
)

TRAIN_RULES: tuple[Rule, ...] = (
    *say(
        "train.learning_rate",
        value,
        f"{WITH}(?:(?:peak|max|maximum|initial|constant) )?(?:learning_?rate|lr|learn_rate){{IS}}{{N}}",
        "{N} (?:as (?:the |a )?|for (?:the )?)?(?:peak )?(?:learning_rate|lr)",
    ),
    *say(
        "train.scheduler",
        kind,
        f"{WITH}(?P<kind>cosine)(?:_(?:annealing|annealed|decay|schedul\\w+|learning_rate|lr)){{0,4}}",
        f"{WITH}(?P<kind>linear|constant)(?:_(?:decay|schedul\\w+|learning_rate|lr)){{1,4}}",
        "(?:lr_)?schedule(?:r)?(?:_type)?{IS}(?P<kind>cosine|linear|constant)",
    ),
    *say(
        "unsupported",
        "train.scheduler",
        "(?:polynomial|wsd|exponential|inverse_sqrt|cosine with restarts)"
        "(?:_(?:decay|schedul\\w+|lr|learning_rate)){0,3}",
    ),
    *say("train.weight_decay", value, f"{WITH}(?:weight_decay|wd){{IS}}{{A}}", "{A} weight_decay"),
    *say("train.weight_decay", 0, f"{OFF} weight_decay"),
    *say(
        "train.max_grad_norm",
        value,
        "(?:max_)?grad(?:ient)?s?_(?:norm|clip(?:ping)?)(?:_norm)?{IS}{N}",
        "clip (?:the )?(?:gradients?|grads?)(?: norm)? (?:at|to) {N}",
    ),
    *say(
        "batch",
        value,
        f"{WITH}batch(?:_?size)?{{IS}}{{N}}",
        "(?:in )?batch(?:es)? of {N}",
        "bs{IS}{N}",
        "{N}_batch(?:_size)?",
    ),
    *say(
        "train.effective_batch",
        value,
        f"{WITH}(?:effective|global|total)_(?:train_)?batch(?:_?size)?{{IS}}{{N}}",
        f"{{N}} {ROWS} (?:per|each|a|for each) (?:optimi[sz]er )?(?:batch|step|update)",
    ),
    *say(
        "train.micro_batch",
        value,
        f"{WITH}(?:micro|per_device|mini|device)_(?:train_)?batch(?:_?size)?{{IS}}{{N}}",
        "batch(?:_?size)? (?:of )?{N} per (?:device|gpu)",
    ),
    *say(
        "accumulate",
        value,
        f"{WITH}(?:grad(?:ient)?s?_)?accum(?:ulat\\w+)?(?: gradients?)?(?:_steps?)?(?: (?:over|for))?{{IS}}{{N}}"
        "(?: (?:steps?|batches))?",
        "{N} (?:steps? of )?(?:grad(?:ient)?_)?accumulation(?: steps?)?",
        "ga{IS}{N}",
    ),
    *say("train.packing", True, f"{WITH}(?:sequence )?pack(?:ing|ed)" + tail("on true enabled sequences rows", 2)),
    *say("train.packing", False, f"{OFF} (?:sequence )?pack(?:ing|ed)?", "packing (?:off|false|disabled)", "unpacked"),
    *say("train.dtype", "bfloat16", "(?:in )?" + WITH + "(?:bf_?16|bfloat_?16|bfloat)(?: precision| training)?"),
    *say("train.dtype", "float16", "(?:in )?" + WITH + "(?:fp_?16|float_?16|{F} precision)(?: precision| training)?"),
    *say(
        "train.dtype", "float32", "(?:in )?" + WITH + "(?:fp_?32|float_?32|full precision|{N} precision)(?: training)?"
    ),
    *say(
        "train.optimizer",
        lambda hit: "adamw-8bit" if hit.number().value == 8 else None,
        f"{WITH}{{N}}_bit (?:adam_?w?|optimi[sz]er)",
        f"{WITH}adam_?w?_{{N}}_?bit(?: optimi[sz]er)?",
    ),
    *say("train.optimizer", "adamw-8bit", "(?:paged_)?adamw_8bit"),
    *say("train.optimizer", "adamw", f"{WITH}adam_?w?(?: optimi[sz]er)?", "optimi[sz]er{IS}adam_?w?"),
    *say(
        "unsupported",
        "train.optimizer",
        f"{WITH}(?:sgd|adafactor|lion|muon|galore|shampoo|sophia)(?: optimi[sz]er)?",
    ),
    *say(
        "train.activation_checkpointing",
        True,
        f"{WITH}(?:gradient|activation|grad)_checkpoint(?:ing|s)?(?: on| true)?",
    ),
    *say(
        "train.activation_checkpointing",
        False,
        f"{OFF} (?:gradient|activation|grad)_checkpoint(?:ing|s)?",
        "(?:gradient|activation)_checkpointing (?:off|false)",
    ),
    *say(
        "train.keep_checkpoints",
        value,
        "keep(?:ing)? " + lead("only just the up to at most last best latest newest") + "{N} checkpoints?",
        "save_total_limit{IS}{N}",
    ),
    *say(
        "train.early_stopping",
        value,
        f"{WITH}early_stop(?:ping)?"
        + tail("after with a patience of when it")
        + "{IS}{N}(?: (?:evals?|evaluations?|rounds?))?",
        "(?:with )?early_stop(?:ping)?,? (?:with |and )?(?:a )?patience{IS}{N}",
        "patience{IS}{N}",
    ),
    *say("train.early_stopping", 3, f"{WITH}early_stop(?:ping)?", "stop early"),
    *say("train.seed", value, f"{WITH}(?:random )?seed{{IS}}{{N}}"),
)

ANSWERS = "(?:generations?|completions?|rollouts?|answers?|samples?|responses?)"
UP_TO = "(?:(?:up to|at most|about|around|max(?:imum)?|no more than) ){0,2}"
PAIR_LOSS = (
    "(?P<kind>ipo|hinge|sigmoid_norm|sigmoid|robust|exo(?:_pair)?|nca(?:_pair)?|bco(?:_pair)?|sppo(?:_hard)?|"
    "aot(?:_unpaired)?|apo(?:_(?:zero|down))?|discopop)"
)

TUNING_RULES: tuple[Rule, ...] = (
    *say(
        "beta", value, f"{WITH}(?:dpo_|kto_|kl_)?beta{{IS}}{{N}}", f"{WITH}kl(?:_(?:penalty|coefficient))?{{IS}}{{N}}"
    ),
    *say("dpo.loss", pair_loss, f"{WITH}{PAIR_LOSS}_loss", f"{WITH}loss{tail('type function', 1)}{{IS}}{PAIR_LOSS}"),
    *say("dpo.label_smoothing", value, f"{WITH}label_smoothing{{IS}}{{A}}"),
    *say("dpo.reference", "none", f"{OFF} (?:a |any )?reference(?:_model)?", "reference_free"),
    *say(
        "grpo.num_generations",
        value,
        f"{WITH}{{N}} (?:generations|completions|rollouts|attempts|answers|samples|responses)"
        " (?:per|for each|each|for every|a) (?:prompt|question|problem|row|example)",
        f"{WITH}{{N}} (?:generations|rollouts|completions)",
        "(?:num_generations|generations|group_size){IS}{N}",
        "groups? of {N}",
    ),
    *say("", samples, f"{WITH}{{N}} {ANSWERS},? (?:of|with) {UP_TO}{{N2}}_tokens?(?: each)?"),
    *say(
        "grpo.max_completion",
        tokens,
        "max_completion(?:_length|_tokens)?{IS}{N}(?: tokens?)?",
        "(?:max(?:imum)?_)?(?:completion|generation|response|answer)_length{IS}{N}(?: tokens?)?",
        f"{WITH}{ANSWERS} (?:of|with) {UP_TO}{{N}}_tokens?(?: each)?",
        f"{WITH}{UP_TO}{{N}}_tokens? (?:per|for each|each|an|a) {ANSWERS}",
        f"{WITH}{UP_TO}{{N}}_tokens?_{ANSWERS}",
        "max_new_tokens{IS}{N}",
        f"{WITH}{UP_TO}{{N}} new tokens",
    ),
    *say("grpo.temperature", value, f"{WITH}temp(?:erature)?{{IS}}{{N}}"),
    *say("grpo.loss", kind, f"{WITH}(?P<kind>dapo|dr_grpo|bnpo)(?: loss)?", f"{WITH}(?P<kind>grpo) loss"),
    *say("grpo.epsilon", value, f"{WITH}(?:clip(?:ping)?_)?eps(?:ilon)?(?:_low)?{{IS}}{{N}}"),
    *say("grpo.epsilon_high", value, f"{WITH}(?:clip(?:ping)?_)?eps(?:ilon)?_high{{IS}}{{N}}"),
    *say(
        "grpo.num_iterations",
        value,
        f"{WITH}{{N}} (?:iterations|updates|passes|inner epochs) (?:per|on each) (?:batch|rollout|generation)",
        "num_iterations{IS}{N}",
    ),
    *say(
        "grpo.scale_rewards",
        "none",
        f"{OFF} (?:reward_scaling|(?:scal\\w+|normali[sz]\\w+) (?:of )?(?:the )?rewards?)",
    ),
    *say("grpo.mask_truncated", True, f"{WITH}mask(?:ing)?(?: out)? (?:the )?(?:truncated|cut) {ANSWERS}"),
    *say(
        "grpo.rewards",
        lambda hit: (hit.group("R"),),
        f"{WITH}(?:my |custom )*rewards?" + tail("function functions file from in is are") + " {R}",
        lead("with use using and", 2) + "{R} (?:as|for|is) (?:the |a |my )*rewards?(?: functions?)?",
    ),
    *say(
        "distill.teacher",
        lambda hit: hit.group("W"),
        lead("and with using use from by the a its", 3) + "teacher(?: model)?{IS}{W}",
        lead("and with using use from by", 2) + "{W} (?:as|for|is|being) (?:the |a |its )?teacher(?: model)?",
    ),
)
