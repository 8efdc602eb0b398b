"""The OpenAPI document against the live server: requests made from it are answered as it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from live_server import Live, serve
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged.integrations.openai_server import ServerOptions

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]
"""Without the one that whatever fits the schema is accepted: a token id may be outside the vocabulary."""


@pytest.fixture(scope="module")
def live(tiny_checkpoint: str) -> Iterator[Live]:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    # Short answers, whatever is asked for.
    options = {"page_size": 16, "num_pages": 512, "max_num_seqs": 16, "max_model_len": 64}
    with serve(hf_paged.wrap(model, **options), ServerOptions(api_key=["key"])) as running:
        yield running


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_answers_are_as_the_document_says(live: Live, mode: GenerationMode) -> None:
    headers = {"Authorization": "Bearer key"}
    document = schemathesis.openapi.from_url(live.url + "/openapi.json", headers=headers)
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) > 8
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and "requestBody" not in operation.definition.raw:
            continue  # nothing of it can be wrong

        @settings(
            max_examples=20,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy(generation_mode=mode))
        def answered(case: Any) -> None:
            case.call_and_validate(headers=headers, checks=CHECKS, timeout=60)
            live.wait_idle()

        answered()
