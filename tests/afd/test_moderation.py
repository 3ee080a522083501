"""Words of moderation in the spellings of public services, and words that only look like them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from afd.errors import Unanswered
from afd.teachers.paid.answers import Kind, Reply
from afd.teachers.paid.ledger import Ledger
from afd.teachers.paid.moderation import complaint
from afd.teachers.paid.service import refusal
from afd.teachers.paid.teacher import PROVIDERS
from tests.afd.paid import paid_config, teacher_of, video_bytes
from tests.afd.service import KEY, WIRES, Exchange, Service, answer

VIDEO = video_bytes()
OPENAI = "Your request was rejected as a result of our safety system."
AZURE = {
    "code": "content_filter",
    "message": "The response was filtered due to the prompt triggering Azure OpenAI's content "
    "management policy.",
    "innererror": {"code": "ResponsibleAIPolicyViolation"},
}
GOOGLE = (
    "The prompt could not be submitted. This prompt contains sensitive words that violate Google's "
    "Responsible AI practices. Support codes: 58061214"
)
REJECTIONS: list[Any] = [
    {"error": {"code": "moderation_blocked", "type": "image_generation_user_error"}},
    {"error": {"code": None, "type": "invalid_request_error", "message": OPENAI}},
    {"error": {"code": "content_policy_violation", "message": "no"}},
    {"error": {"message": "litellm.ContentPolicyViolationError: AzureException - filtered"}},
    {"error": {"message": "upstream: {'code': 'content_filter', 'param': 'prompt'}"}},
    {
        "error": {
            "code": "invalid_prompt",
            "message": "Invalid prompt: your prompt was flagged as "
            "potentially violating our usage policy.",
        }
    },
    {"error": AZURE},
    {"error": {"code": "invalid_request", "inner_error": {"code": "ResponsibleAIPolicyViolation"}}},
    {"error": "content_filter"},
    {"error": ["moderation_blocked"]},
    "content_policy_violation",
    {"error": OPENAI},
    {"detail": OPENAI},
    {"message": "Your prompt was flagged by our content moderation system"},
    {"error": {"code": "InputTextSensitiveContentDetected", "message": "x"}},
    {"error": {"code": "OutputVideoSensitiveContentDetected.PolicyViolation"}},
    {"error": {"code": "SensitiveContentDetected.SevereViolation"}},
    {"error": {"code": "InputTextRiskDetection"}},
    {"error": {"code": "OutputImageRiskDetection"}},
    {
        "error": {
            "type": "BadRequest",
            "message": "The request failed because the output video may "
            "contain sensitive information. Request id: 02",
        }
    },
    {
        "error": {
            "message": "The request failed because the output video may be related to copyright "
            "restrictions."
        }
    },
    {
        "detail": [
            {
                "loc": ["body", "prompt"],
                "type": "content_policy_violation",
                "msg": "The content was flagged by a content checker.",
            }
        ]
    },
    {
        "detail": [
            {"msg": "x", "type": "string_type"},
            {"msg": "NSFW content detected", "type": "v"},
        ]
    },
    {"detail": [{"type": "no_media_generated", "msg": "No media was generated"}]},
    {"error_type": "content_policy_violation", "detail": "no"},
    {"code": "DataInspectionFailed", "message": "Input data may contain inappropriate content."},
    {"error": {"code": "data_inspection_failed"}},
    {"output": {"code": "IPInfringementSuspect", "message": "no", "task_status": "FAILED"}},
    {"base_resp": {"status_code": 1026, "status_msg": "input new_sensitive"}},
    {"base_resp": {"status_code": 1027, "status_msg": "output new_sensitive"}},
    {"error": {"message": "input new_sensitive (1026)"}},
    {"code": 1301, "message": "Trigger content security policy"},
    {"data": {"task_status_msg": "Failure to pass the risk control system"}},
    {"failure": "blocked", "failureCode": "SAFETY.INPUT.TEXT"},
    {"failureCode": "INPUT_PREPROCESSING.SAFETY.THIRD_PARTY"},
    {"failure_reason": "Advanced moderation failed: prompt was blocked"},
    {"error": {"code": 3, "message": GOOGLE}},
    {"response": {"raiMediaFilteredReasons": ["58061214"]}},
    {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}},
    {"finishReason": "SAFETY"},
    {
        "error": "The input or output was flagged as sensitive. Please try again with different "
        "inputs. (E005)"
    },
    {"error": {"message": "NSFW content detected in prompt"}},
    {"error_code": "prompt_unsafe"},
    {"code": 400, "msg": "content rejected by moderation", "data": {"flagged": True}},
    {"error": {"message": "输入内容包含敏感信息，请修改后重试"}},
    {"error": {"code": "CONTENT-FILTERED"}},
    {"error": {"code": "NSFWContentDetected"}},
]
OTHERS: list[Any] = [
    {"error": {"code": "invalid_request_error", "message": "unsafe header: Authorization"}},
    {"error": {"message": "The content moderation service is temporarily unavailable"}},
    {"error": {"message": "content filter timed out"}},
    {"error": {"code": "content_filter_error"}},
    {"error": {"code": "moderation_unavailable"}},
    {"error": {"code": "ContentSecurityDetectionError", "message": "Internal error."}},
    {"error": {"code": "insufficient_quota", "message": "You exceeded your current quota, please "
               "check your plan; see our usage policy"}},
    {"error": {"message": "Request violates the rate limit policy of your plan"}},
    {"error": {"message": "Unknown parameter: 'safety_identifier'"}},
    {"error": {"code": "unknown_parameter", "message": "Unknown parameter: nsfw_filter"}},
    {"error": {"message": "invalid safety settings: threshold must be one of ..."}},
    {"error": {"code": "invalid_safety_setting"}},
    {"error": {"code": "InternalServiceError", "message": "The service encountered an error"}},
    {"detail": [{"loc": ["body", "safety_tolerance"], "type": "missing", "msg": "Field required",
                 "input": {"prompt": "nsfw content_filter"}}]},
    {"error": {"message": "prompt is too long"}, "prompt": "a sensitive, nsfw scene is blocked"},
    {"error": {"code": "server_error", "message": "Video generation failed"}},
    {"error": {"message": "balance insufficient; blocked"}},
    {"message": "Invalid content type, header is missing"},
    {"base_resp": {"status_code": 0, "status_msg": "success"}},
    {"error": {"code": "runner_disconnected"}},
    {"code": 1302, "message": "Your requests are too frequent"},
    "<html>blocked by our content policy</html>",
]  # fmt: skip


@pytest.mark.parametrize("body", REJECTIONS, ids=lambda body: str(body)[:70])
def test_a_rejection_is_known_in_every_spelling(body: Any) -> None:
    assert complaint(body).moderated
    failure = refusal(Reply(400, {}, body, str(body)), "insufficient|balance")
    assert (failure.kind, failure.certain) == (Kind.CONTENT, True)
    assert failure.reason.startswith("HTTP 400 ")


@pytest.mark.parametrize("body", OTHERS, ids=lambda body: str(body)[:70])
@pytest.mark.parametrize("status", [400, 422, 429, 500])
def test_what_only_looks_like_one_is_none(body: Any, status: int) -> None:
    parsed = None if str(body).startswith("<") else body
    failure = refusal(Reply(status, {}, parsed, str(body)), "insufficient|balance")
    assert failure.kind is not Kind.CONTENT


def test_a_sentence_decides_only_where_the_answer_speaks_of_the_request() -> None:
    def kind(status: int, body: Any) -> Kind:
        return refusal(Reply(status, {}, body, ""), "none").kind

    for status in (401, 402, 404, 429, 500, 503):
        assert kind(status, {"error": OPENAI}) is not Kind.CONTENT
    for status in (200, 403, 422, 429, 451, 500):
        assert kind(status, {"error": {"code": "content_filter"}}) is Kind.CONTENT
    for status in (401, 402):
        assert kind(status, {"error": {"code": "content_filter"}}) is Kind.QUOTA
    account = {"error": "Your account violates our usage policies"}
    assert kind(403, account) is Kind.QUOTA


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Any:
    for provider in PROVIDERS.values():
        monkeypatch.setenv(provider.key_variable, KEY)
    with Service(VIDEO).running() as running:
        yield running


def failed(error: Any, status: str) -> Any:
    """A task that ends so."""

    def fault(exchange: Exchange) -> bool:
        exchange.say(200, {"id": "x", "status": status} | error)
        return True

    return fault


@pytest.mark.parametrize("at", ["submit", "task", "task without a state", "state"])
@pytest.mark.parametrize("wire", WIRES)
def test_a_rejection_is_remembered_and_never_bought_again(
    service: Service, tmp_path: Path, wire: str, at: str
) -> None:
    body: dict[str, Any] = {"error": AZURE}
    if at == "submit":
        service.script("submit", answer(400, body))
    else:
        word = {"task": "FAILED", "state": "Request Moderated"}.get(at, "")
        service.script("poll", failed({} if at == "state" else body, word))
    for _ in range(2):
        teacher = teacher_of(paid_config(wire, service, tmp_path))
        error = teacher.start(teacher.requests[0]).exception()
        teacher.close()
        assert isinstance(error, Unanswered)
        assert error.rejected
        assert "content_filter" in str(error) or at == "state"
    books = Ledger.snapshot(tmp_path / "videos")
    assert books.counts() == {"content": 1}
    books.close()
    assert service.seen("POST", "") == 1
