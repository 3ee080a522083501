"""Detection of moderation in error responses: the table of codes and phrases of all services.

A false positive means that a prompt is silently never bought again, a false negative that it is
paid for repeatedly. Therefore machine-readable codes decide wherever they appear; sentences decide
only if they concern content and not a fault, a limit, an account or a field of the request; and
fields that merely echo the request (prompt, input, the URL of a page) are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

# Patterns of codes, in lower case with only letters and digits; for each the service that uses it,
# and where it is documented or was observed.
CODES = {
    # OpenAI's images and videos APIs; litellm's exceptions; many gateways
    "contentpolicy": "OpenAI: content_policy_violation; fal's error reference",
    "moderationblocked": "OpenAI's image and video APIs",
    "sentinelblock": "OpenAI's Sora",
    "safetyviolation": "OpenAI-compatible gateways",
    "usagepolicy": "OpenAI-compatible gateways",
    r"^misalignment": "OpenAI's Sora",
    # Azure OpenAI, content filtering page: error.code and error.innererror.code
    r"contentfilter(ed|violation)?$": "Azure OpenAI, vLLM and others' finish reason",
    "responsibleaipolicy": "Azure OpenAI",
    # Volcengine Ark and BytePlus ModelArk, error code page: Input|Output x Text|Image|Video|Audio,
    # also with .PolicyViolation, .PrivacyInformation, .SevereViolation
    "sensitivecontent": "Volcengine Ark: OutputVideoSensitiveContentDetected",
    r"(text|image|video|audio|content)risk(detection(?!error)|notice)": "Volcengine Ark",
    "privacyinformation": "Volcengine Ark",
    r"copyright(restrict|violat|infring|detect)": "Volcengine Ark and others",
    r"^(content)?policyviolation": "Volcengine Ark's suffix alone",
    r"^sensitive": "generic",
    # Alibaba DashScope, status code page
    "datainspection": "DashScope: DataInspectionFailed, data_inspection_failed",
    "ipinfringement": "DashScope: IPInfringementSuspect",
    # fal's error reference
    "nomediagenerated": "fal",
    r"nsfw": "fal, Together and others",
    # Google: Gemini's BlockedReason and FinishReason, Veo's raiMediaFilteredReasons
    r"^(image|output|input)?safety$": "Google: SAFETY, IMAGE_SAFETY",
    r"prohibited(content|use)": "Google: PROHIBITED_CONTENT",
    r"^(blocklist|spii|recitation)$": "Google",
    "raimedia|raifilter": "Google's Veo",
    # Runway, task failure page: SAFETY.INPUT.TEXT, INPUT_PREPROCESSING.SAFETY.THIRD_PARTY
    r"^safety(input|output|text|image|video|filter|check|block|third)": "Runway and others",
    "inputpreprocessingsafety": "Runway",
    # MiniMax: base_resp.status_code 1026, 1027; Kling and Zhipu: code 1301
    r"^(1026|1027|1301)$": "MiniMax, Kling",
    "newsensitive": "MiniMax",
    # Luma, Black Forest Labs, Stability, Adobe Firefly
    r"(content|request|input|output|prompt)s?moderat": "BFL: Request Moderated, Content Moderated",
    r"^moderat(ed|ion)(block|fail|reject|violat|flag|detect)?": "Luma and others",
    r"(prompt|media|content)unsafe|unsafe(content|prompt|media)": "Adobe Firefly: prompt_unsafe",
    r"(content|prompt|input|output)(was|is)?(flagged|blocked|rejected)": "generic",
    r"flaggedcontent|inappropriate|harmfulcontent": "generic",
}
# Codes that report a fault of the moderation system itself, or a field with a similar name.
NO_CODES = (
    r"error$|unavailable|timeout|timedout|overload|ratelimit|quota|invalid|unsupported|missing"
    r"|setting|identifier|header|internal|notfound|parameter|tolerance|disabled"
)
# Codes that services also write within sentences, and that are unambiguous there.
WRITTEN = (
    r"content_filter(?![\w-])|content_policy_violation|moderation_blocked|responsibleaipolicyviolation"
    r"|sensitivecontentdetected|data_?inspection_?failed|(?<![a-z])new_sensitive|prohibited_content"
    r"|(text|image|video|audio)riskdetection(?!error)|input_preprocessing\.safety"
    r"|(?<![\w.])safety\.(input|output)|contentpolicyviolationerror|nsfw_content"
)
# Sentences.
_CONTENT = (
    r"(sensitive|inappropriate|prohibited|nsfw|unsafe|explicit|harmful|sexual|violent|violating"
    r"|disallowed|objectionable|copyright\w*|real (person|people))"
)
_POLICY = (
    r"((content|usage|safety|moderation|community|acceptable use|use case|responsible ai|our)"
    r"[\w' -]{0,40}(polic(y|ies)|guidelines?|practices|rules|standards|terms)"
    r"|terms of (service|use)|responsible ai|platform rules)"
)
_STOPPED = (
    r"(reject|block|refus|flag|filter|declin|denied|trigger|violat|against|fail|not pass|held)"
)
SENTENCES = (
    rf"content management policy|{_STOPPED}\w{{0,9}}[^.;]{{0,80}}{_POLICY}"
    rf"|{_POLICY}[^.;]{{0,40}}{_STOPPED}"
    rf"|(contain|includ|related to|flagged|detected|consider|deem|identif|generat)\w{{0,9}}"
    rf"[^.;]{{0,60}}{_CONTENT}|{_CONTENT}[ \w-]{{0,30}}(content|words?|information|material)?"
    rf"[ \w-]{{0,20}}(detected|flagged|blocked|found|not allowed)"
    rf"|{_STOPPED}\w{{0,9}}[^.;]{{0,80}}(moderation|safety (system|filter|check|reason|polic|"
    r"setting|guideline|concern)|content (checker|filter|safety|review|moderation|security)"
    r"|risk control|copyright|sensitive)"
    rf"|(moderation|safety (system|filter|check\w*)|content (filter|review|security)|risk control)"
    rf"[^.;]{{0,40}}{_STOPPED}|(input|output) \w{{0,8}} ?(is )?sensitive|sensitive words?"
    r"|\bnsfw\b|not allowed by (our|the) (safety|content|moderation)"
    r"|敏感|违规|违反.{0,12}(规定|政策|法规|规范)|审核(不|未)通过|未通过.{0,8}审核|内容(安全|审核)"
    r"|不合规|风控|不適切|ポリシー(に|違反)"
)
NO_SENTENCES = (
    r"header|unavailable|time(d)? ?out|temporar|internal (server )?error|overload|rate.?limit"
    r"|too many requests|quota|billing|balance|credit|payment|insufficient|concurren|api.?key"
    r"|unauthori[sz]ed|permission|unknown (parameter|field|argument)|unrecognized|unsupported"
    r"|not supported|invalid (value|type|parameter|argument|field|json|safety|moderation|content)"
    r"|missing|field required|must be|account (is|has|was)|try again later|service (is )?down"
    r"|could not reach|connection|network|超时|不可用|欠费|余额|限流|稍后"
)
_CODES = re.compile("|".join(CODES))
_NO_CODES, _WRITTEN = re.compile(NO_CODES), re.compile(WRITTEN)
_SENTENCES, _NO_SENTENCES = re.compile(SENTENCES), re.compile(NO_SENTENCES)

# Fields of a response that report an error, as objects, lists or strings. Other fields (prompt,
# input, loc, url, id) echo the request.
_IN_CODES = (
    "code type error_type error_code err_code errcode errcodeext reason status_code failure_code"
    " fail_code failurecode failcode finish_reason finishreason blockreason block_reason category"
    " categories"
)
_IN_WORDS = (
    "error errors detail details message msg errmsg error_message error_msg errormessage"
    " err_msg failure failure_reason failurereason fail_reason failreason fail_message failmessage"
    " status_msg status_message statusmessage task_status_msg task_error"
    " last_error lasterror innererror inner_error base_resp incomplete_details"
    " raimediafilteredreasons rai_media_filtered_reasons prompt_feedback promptfeedback exception"
)
_WRAPPERS = "data response result output body"
_NAMES_OF_CODES, _NAMES_OF_WORDS = set(_IN_CODES.split()), set(_IN_WORDS.split())
_FLAGS = {"nsfw", "flagged", "has_nsfw_concepts", "moderated", "is_nsfw", "content_filtered"}
_MOST = 32  # strings that are examined


@dataclass(frozen=True)
class Complaint:
    """The error reported in a response: machine-readable codes and sentences."""

    codes: tuple[str, ...] = ()
    sentences: tuple[str, ...] = ()

    @property
    def code(self) -> str:
        return self.codes[0] if self.codes else ""

    @property
    def reason(self) -> str:
        """Human-readable reason, e.g. `moderation_blocked: Your request was rejected.`"""
        sentences = [sentence for sentence in self.sentences if sentence != self.code]
        return ": ".join(part for part in (self.code, "; ".join(sentences[:2])) if part)[:300]

    def __bool__(self) -> bool:
        return bool(self.codes or self.sentences)

    @property
    def moderated(self) -> bool:
        """Whether the video was stopped by moderation."""
        return any(map(_is_code, self.codes)) or any(map(_is_sentence, self.sentences))

    @property
    def surely_moderated(self) -> bool:
        """Whether a code reports moderation; sentences alone may concern something else."""
        written = (_WRITTEN.search(sentence.lower()) for sentence in self.sentences)
        return any(map(_is_code, self.codes)) or any(written)


def complaint(answer: Any) -> Complaint:
    """Extract the Complaint from a response, or from the part of it that holds the error."""
    codes: list[str] = []
    sentences: list[str] = []
    for is_code, word in _words(answer, False, 6):
        # A single word is a code in any field; several words in a code field count as both.
        several = re.search(r"[\s\u3000-\uffef]", word) is not None
        for into, fits in ((codes, is_code or not several), (sentences, several or not is_code)):
            if fits and word not in into and len(codes) + len(sentences) < _MOST:
                into.append(word)
    return Complaint(tuple(codes), tuple(sentences))


def _words(value: Any, is_code: bool, depth: int) -> Iterator[tuple[bool, str]]:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        word = str(value)[:1000].strip()
        if word and word.lower() not in ("none", "null", "ok", "success", "0", "200"):
            yield is_code, word
    if depth and isinstance(value, list):
        for item in value[:_MOST]:
            yield from _words(item, is_code, depth - 1)
    if depth and isinstance(value, dict):
        named = {name.lower().replace("-", "_"): held for name, held in value.items()}
        # Codes first, as the first one is shown in `Complaint.reason`.
        for names, codes in ((_NAMES_OF_CODES, True), (_NAMES_OF_WORDS, False)):
            for name in (name for name in named if name in names):
                if name.startswith("rai"):
                    yield True, "raiMediaFiltered"
                yield from _words(named[name], codes or is_code, depth - 1)
        for name in _FLAGS & named.keys():
            flag = named[name]
            if flag is True or (isinstance(flag, list) and True in flag):
                yield True, f"nsfw ({name})"
        for name in _WRAPPERS.split():
            if isinstance(named.get(name), dict):
                yield from _words(named[name], False, depth - 1)


def _is_code(code: str) -> bool:
    if _WRITTEN.search(code.lower()):
        return True
    letters = re.sub(r"[\W_]+", "", code.lower())
    return _CODES.search(letters) is not None and not _NO_CODES.search(letters)


def _is_sentence(sentence: str) -> bool:
    lower = sentence.lower()
    if _WRITTEN.search(lower):
        return True
    return _SENTENCES.search(lower) is not None and not _NO_SENTENCES.search(lower)


def any_moderated(words: Iterable[str]) -> bool:
    """Whether any of these codes reports moderation."""
    return any(map(_is_code, words))
