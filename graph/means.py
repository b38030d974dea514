"""The words for where it runs, under which caps, and what becomes of the result; a table as in vocabulary.py."""

from __future__ import annotations

import re
from typing import Any

from tunesmith.graph.rules import Hit, Rule, lead, say, tail, value
from tunesmith.graph.sentence import NUM
from tunesmith.graph.surroundings import named
from tunesmith.graph.vocabulary import OFF

CAP = lead(
    """in for under within at most max maximum no more than less up to below about time limit limited budget cap capped
    of only a the is it cost costs costing spend spending pay over exceed exceeding not never don't do finish
    finished done stop after and take taking fit fits into on using have has having with should must total training
    train run running my that ram vram memory price keep""",
    9,
)
PER = "(?! ?(?:/|per\\b|an hour|a day|each))"
GGUF_KIND = (
    "(?P<kind>i?q[1-8](?:_?(?:k(?:_?[sml])?|[01]|xxs|xs|nl|s|m))?|i?q\\d{1,2}(?:\\x5f\\w{1,4})+|"
    "bf16|f16|f32|fp16|float16)"
)
QUANTISED = "(?: (?:quanti[sz]ation|quanti[sz]ed|quants?|precision))?"
_GGUF = "Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_0 Q4_1 Q4_K_S Q4_K_M Q5_0 Q5_1 Q5_K_S Q5_K_M Q6_K Q8_0 F16 BF16 F32 IQ4_NL IQ4_XS"
GGUF_KINDS = tuple(_GGUF.split())
GGUF_SHORT = {
    "Q2": "Q2_K",
    "Q3": "Q3_K_M",
    "Q4": "Q4_K_M",
    "Q5": "Q5_K_M",
    "Q6": "Q6_K",
    "Q8": "Q8_0",
    "Q3_K": "Q3_K_M",
    "Q4_K": "Q4_K_M",
    "Q5_K": "Q5_K_M",
    "FP16": "F16",
    "FLOAT16": "F16",
}
FLAVOR = (
    "(?P<flavor>a10g_(?:small|large(?:x[24])?)|a10g?|t4_(?:small|medium)|t4|l4x[14]|l4|l40s?x[148]|l40s?|a100_large|"
    "a100x[48]|a100|h200x[248]|h200|h100|cpu_(?:basic|upgrade|xl|performance))"
)
_CARDS = "2060 2070 2080 3050 3060 3070 3080 3090 4000 4060 4070 4080 4090 5000 5060 5070 5080 5090 6000"
CARDS = frozenset(_CARDS.split())


def hours(hit: Hit) -> float:
    """A duration in hours: "2 h", "90 minutes", "1 h 30 min", "half an hour", "a day"."""
    unit = {"d": 24.0, "h": 1.0, "m": 1 / 60, "s": 1 / 3600}[(hit.group("unit") or "h")[0].lower()]
    first = 1.0 if hit.has("one") else float(value(hit))
    minutes = hit.number("N2").value if hit.has("N2") else float(hit.group("more") or 0)
    return round(first * unit + minutes / 60, 6)


def memory(hit: Hit) -> dict[str, Any]:
    """A cap on memory, and a GPU of this machine where one is named with it."""
    here = {"hardware": {"gpus": 1}, "backend": "local"} if re.search(r"\b(?:gpu|card)\b", hit.low) else {}
    return {"limits.memory_gb": hit.number().plain, **here}


def gguf(hit: Hit) -> str:
    """A llama.cpp file type as it is spelled there; an unknown one stays as it is, to be refused by name."""
    kind = (hit.group("kind") or "Q4_K_M").upper().replace(" ", "_").replace("-", "_")
    squeezed = {known.replace("_", ""): known for known in GGUF_KINDS}
    return GGUF_SHORT.get(kind) or squeezed.get(kind.replace("_", ""), kind)


def gguf_of_bits(hit: Hit) -> str:
    """ "8-bit GGUF": the usual type of that width."""
    kind = f"Q{hit.number().plain}"
    return "F16" if kind == "Q16" else GGUF_SHORT.get(kind, kind)


def card(hit: Hit) -> dict[str, Any] | None:
    """ "my 4090": a GPU of this machine, by its name."""
    number = str(hit.number().plain)
    if number not in CARDS:
        return None
    more = [word for word in ("ti", "super", "ada", "laptop") if word in hit.low.rpartition(NUM)[2]]
    return {"hardware": " ".join(["RTX", number, *(word.capitalize() for word in more)]), "backend": "local"}


def flavor(hit: Hit) -> dict[str, Any]:
    """Rented hardware by its name, or the user's own."""
    name = (hit.group("flavor") or "").lower().replace("_", "-").replace(" ", "-")
    if set(hit.low.split()) & {"my", "our", "local", "own"}:
        return {"hardware": name.upper(), "backend": "local"}
    name = {"a10": "a10g", "l40": "l40s"}.get(name, name)
    if hit.has("N") and hit.number().value > 1:
        name = f"{'a10g-large' if name in ('a10g', 'a10g-small') else name}x{hit.number().plain}"
    return {"hardware": name} | ({} if name == "h100" else {"backend": "hf-jobs"})


def pushed(hit: Hit) -> dict[str, str | None]:
    """Where to push, and which job's result where one is named."""
    job = {"job": hit.group("R2")} if hit.has("R2") and hit.refs[0].kind == "job" else {}
    return {"deliver.push": hit.group("R"), **job}


PLACE_RULES: tuple[Rule, ...] = (
    *say(
        "backend",
        "hf-jobs",
        lead("on using with in via through to at as a run the", 4)
        + "(?:hugging_?face|hf)(?:'s)?_(?:jobs?|cloud|gpus?|infrastructure)",
        "(?:in|on|to|using) the cloud",
    ),
    *say("backend", "ray", lead("on using with in via through to at the my our a", 3) + "ray(?: cluster)?"),
    *say(
        "backend",
        "local",
        "locally",
        "(?:on |use )?(?:the )?local(?: machine| only| backend)?",
        "(?:on|using) (?:my|this|the|our)(?: own| local)* (?:machine|laptop|computer|desktop|box|pc|mac|macbook|"
        "workstation|server|notebook)(?: locally)?",
        "offline",
    ),
    *say(
        "",
        {"backend": "local", "hardware": "cpu"},
        lead("on using with the my a this local our just only", 4) + "cpus?(?:_only| cores?)?",
    ),
    *say(
        "",
        {"backend": "local", "hardware": {"gpus": 1}},
        "(?:on |using |with |use |in )?(?:my|our|this|local|own|your|the) "
        + lead("local own nvidia rtx geforce single cuda apple", 3)
        + "(?:gpu|graphics card|cuda device|video card)",
        "(?:on|use|using) (?:a |one |the )?(?:gpu|cuda)",
    ),
    *say(
        "",
        card,
        lead("on using with my our a an the single own local nvidia geforce rtx")
        + "{N}(?:_?ti)?(?: super| ada)?(?: laptop)?(?: gpu| card)?",
    ),
    *say(
        "",
        lambda hit: {"hardware": {"gpus": hit.number().plain}},
        lead("on using with across over my our the use", 3) + "{N}_?x?_?(?:nvidia )?gpus?",
    ),
    *say(
        "",
        flavor,
        lead("on using with in my our own local a an the single use nvidia hf", 6)
        + f"{FLAVOR}(?: (?:gpu|instance|machine|flavor|hardware|node))?",
        lead("on using with in my our own local the use", 3) + f"{{N}} ?x? ?(?:nvidia )?{FLAVOR}s?(?: gpus?)?",
    ),
)


LIMIT_RULES: tuple[Rule, ...] = (
    *say(
        "limits.hours",
        hours,
        f"{CAP}{{N}}_(?P<unit>h)(?:ours?|rs?|r)?"
        "(?: ?(?:and )?{N2}_m(?:in(?:ute)?s?)?| ?(?P<more>\\d{1,2})m(?:in)?)?",
        f"{CAP}{{N}}_(?P<unit>m)in(?:ute)?s?",
        f"{CAP}{{N}}_(?P<unit>d)ays?",
        f"{CAP}{{N}}_(?P<unit>s)ec(?:ond)?s?",
        f"{CAP}(?P<one>an|one) (?P<unit>h)our",
        f"{CAP}{{F}} an (?P<unit>h)our",
        f"{CAP}(?P<one>a) (?P<unit>d)ay",
    ),
    *say(
        "limits.usd",
        value,
        f"{CAP}\\$ ?{{N}}(?: usd| dollars)?{PER}",
        f"{CAP}usd ?{{N}}{PER}",
        f"{CAP}{{N}} ?\\${PER}",
        f"{CAP}{{N}}_(?:us )?(?:dollars?|usd|bucks?){PER}",
    ),
    *say("limits.usd", lambda hit: -value(hit), f"{CAP}-\\$ ?{{N}}"),
    *say("limits.usd", lambda hit: value(hit) / 100, f"{CAP}{{N}} cents?"),
    *say(
        "limits.usd",
        0,
        "for free",
        "free of charge",
        "without (?:spending|paying) (?:any money|anything|money)",
        "(?:spend|cost) nothing",
        "at no cost",
    ),
    *say(
        "",
        memory,
        f"{CAP}{{N}}_(?:gb|gib|gigs?|gigabytes?)(?: of)?"
        + tail("vram ram gpu memory video card graphics device", 3)
        + "(?! (?:data|file|csv|jsonl?|model|corpus))",
        "(?:on|using|with) (?:a|an|my|our|the|one) (?:gpu|graphics card|video card|card) (?:with|of|that has|has) "
        "{N}_(?:gb|gib|gigs?|gigabytes?)(?: of)?" + tail("vram ram gpu memory", 3),
    ),
    *say(
        "unsupported",
        "limits.usd",
        f"{CAP}(?:€|£|eur |euros? ){{N}}",
        f"{CAP}{{N}} ?(?:€|£|euros?|eur|pounds|gbp)",
        f"{CAP}\\$ ?{{N}} ?(?:/|per|an) ?h\\w*",
    ),
)

_RESULT = (
    "it this that the my our result results resulting final trained tuned fine_tuned finetuned adapter adapters model "
    "weights merged gguf file files everything up private privately public publicly lora"
)


DELIVER_RULES: tuple[Rule, ...] = (
    *say(
        "",
        pushed,
        lead("and then", 2)
        + "(?:push|upload|publish|send|share|release|put)"
        + tail(_RESULT, 7)
        + "(?: {R2})? (?:to|as|at|on|into|under)"
        + tail(
            "the my our hugging_?face hf hub repo repository account namespace org private public as at to under "
            "called named model and",
            7,
        )
        + " {R}",
        "push{IS}{R}",
    ),
    *say(
        "push.where",
        True,
        lead("and then", 2)
        + "(?:push|upload|publish|share|release)"
        + tail(_RESULT)
        + "(?: (?:to|on)"
        + tail("the my hugging_?face hf hub", 4)
        + ")?",
    ),
    *say(
        "deliver.merge",
        True,
        lead("and then", 2)
        + "(?:merg(?:e|ed|ing)|fuse)"
        + tail("it the adapter adapters lora weights them result with into in back to base a single", 9)
        + "(?: model)?",
    ),
    *say("deliver.merge", False, f"{OFF} merg(?:e|ing|ed)" + tail("it the adapter adapters weights", 2)),
    *say(
        "deliver.gguf",
        gguf,
        lead("to into as in a an the and format", 4)
        + "gguf"
        + tail("file files format model with at in using as and quanti[sz]ed to of type", 5)
        + f" {GGUF_KIND}{QUANTISED}",
        lead("as in with to a at using the", 3) + GGUF_KIND + QUANTISED + " gguf(?: (?:file|format))?",
        lead("as in with to a at using the", 3) + GGUF_KIND.replace("|bf16|f16|f32|fp16|float16", "") + QUANTISED,
    ),
    *say("deliver.gguf", gguf_of_bits, lead("as in with to a at using the", 3) + "{N}_bits? gguf(?: (?:file|format))?"),
    *say(
        "gguf.some",
        True,
        lead("to into as in a an the and", 4) + "gguf(?: (?:file|files|format|model))?",
        lead("to in for with run use it", 4) + "(?:ollama|lm_studio|llama\\.cpp|llamacpp)",
    ),
    *say("deliver.private", True, lead("as to a keep it in", 3) + "private(?:ly)?(?: repo(?:sitory)?| model)?"),
    *say("deliver.private", False, lead("as to a make it in", 3) + "public(?:ly)?(?: repo(?:sitory)?| model)?"),
    *say(
        "name",
        named,
        lead("and then please", 2)
        + "(?:call|name|label)"
        + tail("it this the job run model result my adapter", 3)
        + " {W}",
        "(?:a job |a run |the job |job |run )?(?:named|called) {W}",
        "(?:job_|run_)?name{IS}{W}",
    ),
)
