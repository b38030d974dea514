"""What a sentence asks for: to train, how a job is doing, whether data is fit, advice, or an export.

Patterns run on marked text (graph/sentence.py); repetitions are bounded, so each is linear in its length.
"""

from __future__ import annotations

import re
from collections.abc import Set
from typing import Literal

from tunesmith.graph.rules import Hit, Rule, lead, say, tail
from tunesmith.graph.sentence import REF


def _any(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns))


_FEW = r"(?:[^ .?!]+ ){0,6}?"
_TUNE = r"(?:fine-? ?tun\w*|finetun\w*|train\w*|sft|dpo|grpo|kto|q?lora|align\w*|teach)"
_FIT = (
    r"(?:works?|working|valid|suitable|compatible|ready|usable|ok|okay|good|be used|"
    r"right format|correct format|fine(?!.?tun))"
)
_ENDS = (
    r"(?:done|finish(?:ed)?|completed?|running|stuck|ended|crash(?:ed)?|fail(?:ed)?|diverg\w+|converg\w+|hang(?:ing)?|"
    r"succeed(?:ed)?|learning|overfit\w*|outperform\w*|better than)"
)

STATUS = _any(
    r"\bhow(?:'s|s| is| are| was| were| did)? "
    + _FEW
    + r"(?:doing|going|coming along|progressing|looking|getting on|go)\b",
    r"\bhow far\b|\bwhat (?:step|epoch)\b|\bcompare\b|\b(?:status|progress|eta)\b|\bany (?:update|news)",
    r"\b(?:is|are|has|have|did|was|does) " + _FEW + _ENDS + r"\b",
    r"\bwhen (?:will|does|is|are) " + _FEW + r"(?:done|finish|finished|ready|complete|end|over)\b",
    r"\bhow (?:long|much)(?: longer| more time| more| time)?(?: is| are)?(?: still)? "
    r"(?:left|remaining|until|till|to go)",
    r"\bwhat(?:'s|s| is| was| are) (?:the |my )"
    + _FEW
    + r"(?:loss|losses|step|epoch|throughput|speed|accuracy|perplexity|metrics?|jobs?|runs?|queue)\b",
    r"\b(?:show|list|give|tell) (?:me )?(?:the |my |all |about )*(?:jobs?|runs?|loss|metrics|logs?|queue)\b",
    r"\bwhat(?:'s|s| is) (?:running|happening|going on|left)",
    r"\bwhere (?:is|are) (?:my|the) (?:model|results?|adapter|job|run|output)",
)
OPENS_STATUS = re.compile(
    r"(?:(?:hey|hi|hello|so|ok|okay|please|and|btw),? )*(?:how's|hows|how is|how are|what's the status|"
    r"what is the status|status|is my|is the|are my|has my|has the|did my|did the|when will|any (?:update|news)|"
    r"show me my|list)\b"
)
WILL_TAKE = re.compile(r"\bhow (?:long|much|expensive)\b.{0,60}\b" + _TUNE)
FITS = re.compile(r"\b(?:can|could|will|would|does|is) " + _FEW + rf"(?:{_TUNE}|fit|run|enough)\b")
CHECK = _any(
    r"\b(?:check|validate|verify|inspect|lint|examine|test|see|look at|find out|tell me|make sure|confirm|"
    r"review|analy[sz]e)\b.{0,200}?\b(?:" + _FIT + r"|fits?|right|correct|formatted|format|used?)\b",
    r"\b(?:check|validate|verify|inspect|lint|examine|analy[sz]e) (?:out )?(?:the |my |our |this |that |if |whether )*"
    r"(?:(?:format|quality|columns) of |data_?sets?|data|file|rows|" + REF + r")",
    r"\b(?:does|do|will|would|is|are|can|could) .{0,200}?\b(?:" + _FIT + r"|(?:well|properly|correctly) formatted)\b",
    r"\bcan (?:i|we) (?:use|train on|do \w+ on|run \w+ on)\b",
)
THEN_TRAIN = re.compile(
    r"\b(?:then|and|afterwards|,) (?:please |go ahead and |then |start |run |do )*"
    r"(?:fine-? ?tun\w+|finetun\w+|train|sft|dpo|grpo|run|start|launch)\b"
)
ADVICE = _any(
    r"\bhow (?:do|can|could|should|would|to|does|shall)\b",
    r"\bwhat (?:should|would|do|can|could|does|is|are)\b|\bwhat \w+ (?:do|does|should|is|are|can)\b",
    r"\bwhat's\b|\bwhich\b|\bwhy\b|\bshould (?:i|we)\b",
    r"\brecommend\w*|\bexplain\b|\bhelp\b|\bdifference between\b|\bis it (?:better|ok|possible|worth)",
    r"\bany (?:advice|tips|idea)\b|\badvice\b|\bfix (?:this|it|that)\b|\bbest\b",
)
TOPIC = re.compile(
    r"\b(?:learning rate|rank|epochs?|batch|lora|adapter|tun(?:e|ing)|models?|gpus?|vram|memory|train\w*|data\w*)\b"
)
HOW_TO_TRAIN = re.compile(
    r"\bhow (?:do|can|could|should|would|to|shall) (?:i |we |you |one )?(?:\w+ ){0,2}?" + _TUNE + r"\b"
)
EXPORT = re.compile(
    r"(?:(?:please|can you|could you|now|ok|and|then|i want to|i'd like to),? )*"
    r"\b(?:convert|export|quanti[sz]e|merge|fuse|push|upload|publish|save|deploy|turn|download|package|make|want|need|"
    r"get|give|share)\w*\b"
)
CONTROL = re.compile(
    r"^(?:(?:please|can you|could you|hey|ok|okay|now|just),? )*"
    r"(?P<verb>cancel|stop|abort|kill|pause|resume|retry|restart|approve|reject)\b"
    r"(?: (?:the|my|this|that|it|job|run|training|last|latest|current|plan|failed|" + REF + r"+)){0,6}[.!?]?$"
)
CONTROL_COMMANDS = {"stop": "cancel", "abort": "cancel", "kill": "cancel", "restart": "retry"}

_BASE = "(?:fine_?tun|finetun|train|tun|post_train|re_?train|instruct_tun|speciali[sz]|customi[sz])"
_MADE = "(?:trained|made|built|finished|fine_tuned|finetuned|created|produced|got|sft'd|aligned)"
_BY_ME = f"(?:that |which )?(?:i|we|you)(?:'ve| have)?{tail('just recently already last', 3)} {_MADE}"
_AGO = "(?: (?:earlier|before|yesterday|last|today|recently))?"
_RUN = "(?:fine_?tun\\w+|finetun\\w+|training|experiment|run|job)"

_IT = lead("the my our this a an base model", 4) + "{R}(?= (?:on|with|using|over)\\b)"


def first(hit: Hit) -> str:
    """The word that a phrase begins with."""
    return hit.low.split(" ", 1)[0]


VERB_RULES: tuple[Rule, ...] = (
    *say(
        "verb",
        True,
        _BASE + "e?",
        "(?:teach|adapt|align|personali[sz]e)",
        "(?:do|run|start|launch|kick off|begin|perform|make|create|try|set up|schedule|submit|queue) "
        + lead("a an the new my some short quick small me", 4)
        + f"{_RUN}(?: (?:run|job|experiment))?",
    ),
    *say(
        "verb.object",
        lambda hit: hit.group("W"),
        _BASE + "e? (?:the |my |our )?(?P<W>[a-z][\\w.\ue001+-]{1,80})(?= (?:on|with|using|over|for|from)\\b)",
    ),
    *say("verb.weak", True, "(?:fine_?tun(?:ing|es?|ed)|finetun(?:ing|es?|ed)|training|tuning|trained)"),
    *say(
        "verb.model",
        lambda hit: hit.refs[0],
        _BASE + "(?:e|ing)? " + lead("the my our this a an base model", 4) + "{R}(?! (?:data|dataset|rows|examples))",
        "(?:teach|adapt|align) " + _IT,
    ),
    *say("", lambda hit: {"verb.model": hit.refs[0], "method": first(hit)}, "(?:sft|dpo|grpo|kto|rloo) " + _IT),
    *say("", lambda hit: {"verb.model": hit.refs[0], "adapter.kind": first(hit)}, "(?:q?lora|dora) " + _IT),
    *say(
        "quick",
        True,
        lead("do run make start just a an the it as try only")
        + "(?:quick|fast|short|smoke|sanity|trial|tiny|small)_?(?:little )?"
        + "(?:test|trial|check|smoke|sanity|training|train|experiment|try)?_?"
        + "(?:run|test|experiment|try|training|job|check|fine_?tun\\w+)",
        lead("do run make start just a an the", 5) + "(?:test|trial|smoke) ?(?:run|test|job)",
        "quick(?:ly)?",
        "just (?:to )?(?:try|test)(?: it)?(?: out)?",
    ),
    *say("quick", False, "(?:for |in )?production(?:_(?:run|quality|ready|grade|use))?"),
    *say(
        "model.size",
        lambda hit: hit.words,
        lead("a an the some my", 2)
        + "(?:small |tiny |large |big )?{N}_?(?:b|m|billion|million)(?:_parameters?|_params?)?"
        "(?: (?:base |instruct |chat |language )?(?:models?|llms?|lm))?",
    ),
    *say(
        "plan",
        True,
        "(?:dry_run|plan only|only plan|just plan)",
        f"{lead('but')}(?:don't|do not) (?:run|start|train)(?: it| anything)?(?: yet)?",
        "(?:make |show |give )(?:me )?(?:a |the )?plan(?: for| to)?",
        "plan",
    ),
    *say(
        "job",
        "last",
        "(?:the |my |that |this |our )"
        "(?:(?:last|latest|previous|most recent|recent|newly|just|sft|dpo|fine_tuned|finetuned|tuned|trained|adapted|"
        "lora|resulting|sft'd) ){1,4}(?:models?|adapters?|runs?|jobs?|checkpoints?|results?|one|fine_tune|llms?)"
        f"(?: {_BY_ME})?{_AGO}",
        f"(?:the |my |that )?(?:model|adapter|checkpoint|one|result) {_BY_ME}{_AGO}",
        f"what {_BY_ME}{_AGO}",
        "(?:the |my )?(?:last|latest|previous|most recent) (?:training )?(?:job|run|training|model|adapter)",
    ),
    *say(
        "job.noun",
        "last",
        "(?:my |the |this |that )?(?:training|fine_tuning|finetuning) (?:jobs?|runs?)",
        "(?:my|the|this|that) (?:jobs?|runs?|training|adapter|models?)",
    ),
    *say(
        "job",
        lambda hit: hit.refs[0].text if hit.refs[0].kind == "job" else None,
        lead("the my from of result results model job run adapter after on continue", 5) + "{R}",
    ),
)


# --- the decision ---------------------------------------------------------------------------------------------------

Intent = Literal["train", "status", "check", "advice", "export"]
_ANY_DATA = frozenset({"data.source", "data.name", "ref", "ref.like"})
_ANY_TRAINING = frozenset(
    {"verb", "verb.model", "verb.object", "verb.weak", "method", "method.weak", "method.unknown", "quick"}
)


def find(marked: str, keys: Set[str]) -> Intent | None:
    """The intent of marked text with facts of these keys; None where nothing in it is ours.

    Questions are looked at before orders, because a question names methods, models and data as well.
    """
    verb, model, data = (
        bool(keys & {"verb", "verb.model", "verb.object"}),
        bool(keys & {"model.id", "verb.model", "verb.object"}),
        bool(keys & _ANY_DATA),
    )
    training = bool(keys & _ANY_TRAINING)
    if CONTROL.search(marked):
        return "advice"
    if WILL_TAKE.search(marked) or (HOW_TO_TRAIN.search(marked) and (model or data)):
        return "train"
    if _is_status(marked, bare=not (data and training) and not (verb and model)):
        return "status"
    about_data = data or bool(re.search(r"\bdata", marked))
    checks = about_data and CHECK.search(marked) and not THEN_TRAIN.search(marked)
    if checks and (CHECK.match(marked) or not (verb and model)):
        return "check"
    if "columns.instead" in keys and not (verb or model):
        return "advice"
    asked = ADVICE.search(marked) and not FITS.match(marked)
    if asked and not (model and data) and (training or model or data or keys - {"job.noun"} or TOPIC.search(marked)):
        return "advice"
    delivers = any(key.startswith(("deliver.", "gguf.", "push.")) for key in keys)
    if delivers and not (verb or "method" in keys) and (EXPORT.match(marked) or not data):
        return "export" if EXPORT.search(marked) else None
    if training or (model and data):
        return "train"
    return "train" if (model or "data.source" in keys) and len(marked.split()) <= 4 else None


def _is_status(marked: str, *, bare: bool) -> bool:
    opens = OPENS_STATUS.match(marked) is not None and CHECK.match(marked) is None
    return STATUS.search(marked) is not None and (opens or bare)
