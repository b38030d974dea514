"""Learning rates against transformers' schedulers."""

import pytest
import torch

from tunesmith.executors.kernel.loops.schedule import factor


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("total, warmup", [(20, 0), (20, 5), (7, 7), (1, 0), (1, 1)])
def test_equals_transformers(kind, total, warmup):
    from transformers import get_scheduler

    name = "constant_with_warmup" if kind == "constant" else kind
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        assert 0.3 * factor(kind, step, total, warmup) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()
