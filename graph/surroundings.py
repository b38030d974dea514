"""The words for what is trained on: data, columns, what is held out, and references; a table as in vocabulary.py."""

from __future__ import annotations

import re
from typing import Any

from tunesmith.graph.rules import Hit, Rule, fraction, lead, say, tail, value
from tunesmith.graph.vocabulary import OFF, ROWS

DATA = "(?:data_?sets?|data|corpus|files?|training data|training set|rows|examples|samples|records|lines)"
HELD = "(?:held_out|hold_out|validation|evaluation|evaluating|evals?|validating|testing|test|dev)"
ROLE = (
    "(?P<role>prompts?|questions?|instructions?|inputs?|completions?|answers?|responses?|outputs?|replies|reply|"
    "targets?|chosen|preferred|rejected|text|labels?|messages|conversations?)"
)
ROLES = {
    "prompt": "prompt question instruction input",
    "completion": "completion answer response output reply replie target",
    "chosen": "chosen preferred",
    "rejected": "rejected",
    "text": "text",
    "label": "label",
    "messages": "message messages conversation",
}
KNOWN_DATA = {
    "alpaca": "tatsu-lab/alpaca",
    "capybara": "trl-lib/Capybara",
    "codeforces-cots": "open-r1/codeforces-cots",
    "dolly": "databricks/databricks-dolly-15k",
    "gsm8k": "openai/gsm8k",
    "imdb": "stanfordnlp/imdb",
    "oasst1": "OpenAssistant/oasst1",
    "openhermes": "teknium/OpenHermes-2.5",
    "squad": "rajpurkar/squad",
    "ultrachat": "HuggingFaceH4/ultrachat_200k",
    "ultrafeedback": "HuggingFaceH4/ultrafeedback_binarized",
}
_EMPTY = """a an the it this that which my our on for with and to in of file data dataset model from as is has i we you
    contains uses have are was hf hub huggingface hugging face local works be should does looks"""
_NO_NAME = frozenset(_EMPTY.split())
_COLUMN = frozenset(["column", "columns", "field", "fields", "key"])


def second_part(hit: Hit) -> float | None:
    """ "90/10 split": the second part is held out."""
    first, second = hit.number("N").value, hit.number("N2").value
    return round(second / (first + second), 9) if 0 < second < first else None


def named(hit: Hit) -> str | None:
    """A name; an owner/name is a place to push to, and a filler word is no name."""
    name = hit.group("W") or ""
    return name if name and "/" not in name and name.lower() not in _NO_NAME else None


def known_data(hit: Hit) -> str | None:
    """A data set called by a bare word: one everybody knows, or a word that can only be an id."""
    name = hit.group("W") or ""
    if name.lower() in KNOWN_DATA:
        return KNOWN_DATA[name.lower()]
    return name if re.fullmatch(r"[A-Za-z][A-Za-z0-9]*(?:[_-][A-Za-z0-9]+)*(?:_\w+|\d)", name) else None


def data_name(hit: Hit) -> str | None:
    """A data set called by name: "the dataset foo"."""
    name = named(hit) or ""
    return KNOWN_DATA.get(name.lower(), name) or None


def data_ref(hit: Hit) -> dict[str, Any] | None:
    """A reference with words of data around it; quoted words are data only where they are said to be."""
    ref = hit.refs[0]
    before = hit.sentence.low[hit.match.start() : ref.start].split()
    if ref.kind == "quoted" and (not before or before[-1] not in _SAYS_DATA):
        return None
    return {"data.source": ref} | ({"data.full": True} if {"full", "whole", "entire"} & set(before) else {})


_SAYS = "on over dataset datasets data file files folder"
_SAYS_DATA = frozenset(_SAYS.split())


def role_of(word: str) -> str:
    """Our role for a column's usual name; the word itself where it has none."""
    low = word.lower()
    return next((role for role, names in ROLES.items() if {low, low.removesuffix("s")} & set(names.split())), low)


def column(hit: Hit) -> dict[str, str] | None:
    """One role and its column; a file is no column, and a bare word counts only beside the word column."""
    name = hit.group("W") or ""
    quoted = [ref.kind == "quoted" for ref in hit.refs]
    if not all(quoted) or (not quoted and name.lower() in _NO_NAME):
        return None
    if not (quoted or "_" in name or _COLUMN & set(hit.low.split())):
        return None
    return {role_of(hit.group("role") or ""): name}


def instead(hit: Hit) -> dict[str, str] | None:
    """ "good and bad instead of chosen and rejected": role -> the column it has here."""
    theirs = [hit.group(name) for name in ("W", "W2") if hit.has(name)]
    ours = [hit.group(name) for name in ("W3", "W4") if hit.has(name)]
    found = {role_of(role): name for role, name in zip(ours, theirs, strict=False) if role and name}
    return found if found and set(found) <= set(ROLES) else None


def columns(hit: Hit) -> tuple[str, ...] | None:
    """Columns in the order they are named; only quoted words count."""
    return tuple(ref.text for ref in hit.refs) if all(ref.kind == "quoted" for ref in hit.refs) else None


DATA_RULES: tuple[Rule, ...] = (
    *say(
        "remark",
        True,
        f"(?:i|we|it|there|which|that) (?:have|has|are|got){tail('about some around only just', 2)} {{N}} {ROWS}",
    ),
    *say(
        "data.limit",
        value,
        lead(
            "only just use using on with for the a first subset sample of to limit limited up at most take from top "
            "about it your my our train training is has",
            7,
        )
        + f"{{N}}_(?:training |train |first |data )?{ROWS}(?: (?:only|total))?(?! (?:per|each|a step))",
        lead("the only just on use", 3) + "first {N}",
        "(?:limit|restrict|cap|cut)(?:ed)?" + tail("it the data rows dataset down to at", 4) + f" {{N}}(?: {ROWS})?",
        "(?:max_|num_|n_)(?:train_)?(?:samples|rows|examples){IS}{N}",
        "(?:limit|rows|samples|examples){IS}{N}",
    ),
    *say(
        "",
        lambda hit: {"data.limit": value(hit), "data.random": hit.words},
        lead("on using with a only just use", 3)
        + f"{{N}} (?:random(?:ly)?|randomly (?:chosen|selected|sampled)) {ROWS}",
        f"(?:a )?random (?:sample|subset|selection) of {{N}}(?: {ROWS})?",
    ),
    *say(
        "data.fraction",
        fraction,
        lead("only just use using on with the a first take train about", 5)
        + "(?:{P}|{F})"
        + tail("of the my all its whole full", 4)
        + f" {DATA}",
        lead("only just use using on with the a first take train", 5) + "(?:{P}|{F}) of" + tail("it them the my", 2),
        "(?:only|just|use|using) (?:a |the |first )?(?:{P}|{F})",
        "fraction{IS}{A}",
    ),
    *say(
        "data.full",
        True,
        "(?:on |use |using |over )?(?:the |my |our )?(?:full|whole|entire|complete)(?: of)?(?: the| my)?"
        + f"(?: {DATA})?",
        "(?:on |use |using |over )?all (?:of )?" + lead("the my our", 2) + DATA,
    ),
    *say(
        "data.split",
        lambda hit: (hit.group("W") or "").lower(),
        lead("on using use from the its", 3)
        + "(?P<W>train|test|validation|dev|valid|train_sft|test_sft)_split(?: of)?",
        "split{IS}{W}",
    ),
    *say(
        "data.config",
        named,
        "(?:config(?:uration)?|subset){IS}(?:named |called )?{W}",
        lead("use using with the its", 3) + "(?P<W>[a-z][\\w-]{0,60}) (?:config(?:uration)?|subset)(?: of)?",
    ),
    *say("data.name", data_name, "(?:on|using|with|use|from|over|of) " + lead("the my", 2) + "{W} data_?set"),
    *say("data.name", data_name, "(?:the |a |my )?data_?set(?: (?:is|called|named))?{IS}{W}", "the {W} data_?set"),
    *say("data.name", known_data, "(?:on|using|with|use|from|over|of) " + lead("the my", 2) + "{W}"),
    *say("data.name", lambda hit: KNOWN_DATA.get((hit.group("W") or "").lower()), "{W}"),
)

COLUMN_RULES: tuple[Rule, ...] = (
    *say(
        "columns.instead",
        instead,
        lead("has have with uses use using the its are is named called columns column fields it names", 5)
        + "{W},? (?:and|&|/) {W2}(?: columns?| fields?)? (?:instead of|rather than|not) (?:the )?"
        "{W3},? (?:and|&|/|or) {W4}",
        "{W} (?:->|→|>) {W3}",
        "(?:rename|map|and) (?:the )?{W} (?:to|as) (?:the )?{W3}",
        lead("uses use has have called named with is and the it", 4)
        + "{W}(?: columns?)? (?:instead of|rather than) (?:the )?{W3}",
    ),
    *say(
        "columns",
        columns,
        lead("has have with contains contain uses use using the its are is named called columns column fields keys", 7)
        + "(?:\ue000++(?:, |,? and |,? & |/|,? or | )){1,5}{R}(?: (?:columns?|fields?|keys?))?",
    ),
    *say(
        "columns.role",
        column,
        f"(?:the |my |its )?{ROLE}"
        + tail("column field key text is are in called named lives under comes from the it's")
        + "{IS}{W}(?: (?:column|field|key))?",
        lead("use using with and column field the take")
        + f"{{W}}(?: (?:column|field))? (?:as|for) (?:the )?{ROLE}(?: (?:column|field))?",
    ),
)

EVAL_RULES: tuple[Rule, ...] = (
    *say(
        "eval.fraction",
        fraction,
        "(?:hold|holding|held|keep|keeping|leave|set|setting|split|put|reserve|reserving|save|use|using|with)"
        + tail("out back aside off away a an and", 2)
        + " {A}"
        + tail("of the my data dataset rows examples it them back aside out away off")
        + f" (?:as|for|to){tail('a the an', 2)} {HELD}"
        + tail("set split data rows loss purposes", 2),
        "(?:hold|holding|held|keep|leave|set|split)(?:_| )(?:out|aside|back|off) {A}"
        + tail("of the my data dataset rows it"),
        lead("with a an", 2) + "{A}" + tail("of the my data dataset rows is are as for a it") + f" {HELD}"
        "(?: (?:set|split|data|rows|fraction))?",
        f"{HELD}(?: (?:set|split|fraction|size|share|data))?(?: on)?{{IS}}{{P}}" + tail("of the my data rows", 4),
        f"{HELD}_(?:fraction|share|size|ratio|split){{IS}}{{A}}",
    ),
    *say(
        "eval.fraction",
        second_part,
        "(?:an? )?{N}(?:/|-| / | to | ){N2}(?: |_)(?:[a-z]{3,10}(?:/| / | and |-| ))*split",
    ),
    *say(
        "eval.fraction",
        0,
        f"{OFF} (?:a |the )?(?:{HELD}|evaluate|validate)(?: (?:set|split|data|rows|anything))?",
        "(?:don't|do not) hold (?:anything |any |rows )?(?:out|back)",
    ),
    *say(
        "eval.tasks",
        lambda hit: (hit.group("W"),),
        "(?:and )?(?:evaluat\\w+|benchmark|test|measure|score)"
        + tail("it model models the result both them", 3)
        + " (?:on|with|against|using)(?: the)? {W} benchmark",
        "benchmark (?:it |the model )?(?:on|with|against) (?:the )?{W}",
    ),
)


REFERENCE_RULES: tuple[Rule, ...] = (
    *say(
        "eval.source",
        lambda hit: hit.group("R"),
        lead("and then with", 2)
        + f"(?:(?:evaluate|validate|test)(?: (?:it|the|model|result|on|with|against|using)){{1,6}}|{HELD}"
        + tail("the set split data file rows on with is from in are")
        + ") {R}",
        lead("with using use and", 2) + "{R} (?:for|as) " + lead("the a", 2) + f"{HELD}(?: (?:set|split|data))?",
    ),
    *say(
        "",
        data_ref,
        "(?:(?:train|training|trained|learn|learning|tune|tuned|run|running) )?"
        + lead(
            "on over of data_?sets? data corpus file files folder the my our this these a local set training hub hf "
            "hugging_?face called named found from at in path directory csv json jsonl parquet to is are located "
            "stored lives live sits full whole entire examples rows source using use and there's",
            10,
        )
        + "(?:on|over|of|data_?sets?|data|corpus|files?|folder|source|called|path|full|whole|entire|rows|examples|set|"
        "lives|is|are|in|located|stored|from)(?: the| my| our| this| local){0,3} {R}"
        "(?: (?:data_?sets?|data|files?|corpus|folder|directory|hub dataset))?",
        "(?:the |my |our |this )?{R} (?:data_?sets?|data|files?|corpus|folder|directory)",
    ),
    *say("ref.like", lambda hit: hit.refs[0], "(?:and|plus|&|as well as) " + lead("the also on my") + "{R}"),
    *say(
        "model.id",
        lambda hit: hit.refs[0],
        lead("the my our a", 2)
        + "(?:based on|base_?(?: model)?(?: is| of)?|starting from|start(?:ing)? (?:from|with)|continue from|on top of|"
        "from (?:the )?(?:model|checkpoint|base)|models?(?: is| called| named| at| in)?|checkpoint(?: at)?|weights)"
        + tail("the my a our model base is at in from", 3)
        + "{IS}{R}(?: model)?",
        "(?:the |my |our |a )?{R} (?:models?|checkpoint|weights|"
        "as (?:the |a |my )*(?:base|model|starting point)(?: model)?)",
    ),
    *say(
        "ref",
        lambda hit: hit.refs[0],
        "(?:(?:using|with|use|from|against|via|through|in|take) )?" + lead("the my our this a", 3) + "{R}",
    ),
)
