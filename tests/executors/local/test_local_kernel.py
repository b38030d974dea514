"""The real kernel under the local executor: what it says on its way out arrives."""

import pytest

from tunesmith.executors.local.executor import LocalExecutor
from tunesmith.orchestrator.states import AttemptState


@pytest.mark.slow
def test_a_spec_that_no_plan_resolved_is_refused_by_the_kernel_itself(yard):
    executor = LocalExecutor(yard.home)
    end = yard.end(executor.submit(yard.attempt("ok")), executor, seconds=120)
    assert (end.state, end.exit_code) == (AttemptState.FAILED, 2)
    assert (end.error["type"], end.error["code"]) == ("InputError", "spec.auto")
