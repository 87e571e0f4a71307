"""From a step's rewards to its advantages: what of the table each estimator gets to see."""

import pytest
import torch

from megarl.advantages import remax
from megarl.algorithms.credit import Step, reinforce, scores_of, step_of
from megarl.algorithms.prime import check_outcomes
from megarl.algorithms.remax import greedy_scores
from megarl.config import AdvantageConfig, Config, DataConfig, ModelConfig, RewardConfig
from megarl.data.records import Sample
from megarl.rewards import RewardError
from tests.test_rollout_table import rollout


def test_remax_penalises_the_greedy_response_as_it_does_the_others():
    """Of prompt 1 the greedy response is cut off at 10 tokens and loses 0.5, as the sample of prompt 0 does."""
    cfg = RewardConfig(missing_eos_penalty=0.5)
    sampled = rollout([[1.0, 1.0], [1.0, 0.0]], lengths=[[4, 10], [4, 4]])
    greedy = rollout([[1.0], [1.0]], lengths=[[4], [10]])
    baseline = greedy_scores(cfg, sampled, greedy)
    assert baseline.tolist() == [1.0, 1.0, 0.5, 0.5]
    assert remax(scores_of(cfg, sampled), baseline).tolist() == [0.0, -0.5, 0.5, -0.5]


def test_reinforce_may_leave_truncated_responses_out_of_its_baseline():
    """1, 0 and 5, of which the last reached the limit: the first two are compared with each other alone."""
    table = rollout([[1.0, 0.0, 5.0]], lengths=[[4, 4, 10]])
    samples = [Sample("p0", i, [0] * 6, 2, row=i) for i in range(3)]
    given = {}
    for counted in (True, False):
        cfg = Config(
            model=ModelConfig(path="m"),
            data=DataConfig(path="d"),
            advantage=AdvantageConfig(truncated_in_baseline=counted),
        )
        given[counted] = reinforce(step_of(cfg, table, samples, None)).tolist()
    assert given[True] == [1 - 2.5, 0 - 3.0, 5 - 0.5]
    assert given[False] == [1.0, -1.0, 4.5]


@pytest.mark.parametrize("outcome", [1.5, -0.25, float("nan")])
def test_prime_refuses_an_outcome_that_is_no_probability(outcome):
    table = rollout([[1.0, 0.0], [outcome, 0.5]])
    with pytest.raises(RewardError, match=r"prompt p1, sample 0: prime's outcome is .*, outside \[0, 1\]; so are 0"):
        check_outcomes(table.rewards, table)
    check_outcomes(table.rewards[:2], table.only({0}))


@pytest.mark.gpu
def test_vllms_log_probabilities_meet_the_references_on_the_host():
    """With loss.use_rollout_logps the old ones stay where they arrived, in host memory."""
    sample = Sample("p", 0, [0, 0, 0], 1, rollout_logps=torch.tensor([-1.0, -2.0]), row=0)
    sample.ref_logps = torch.tensor([-1.5, -1.0], device="cuda")
    one = torch.zeros(1)
    step = Step(AdvantageConfig(), one, one.long(), one.bool(), [sample], None, kl_coef=0.1)
    assert step.kl.tolist() == [[0.5, -1.0]]
